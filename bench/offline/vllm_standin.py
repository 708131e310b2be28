"""A stand-in for vLLM on CUDA where there is neither: what gadcore calls of it, its rules, a small decoder in torch.

    with installed():                     # `import vllm` gives this module
        engine = VLLMEngine(...)          # a model whose tensors say that they lie on CUDA

What vLLM forbids, or what would compute with something that is gone, raises or gives NaN here. Each rule names the
place in vLLM 0.32 that it was read from, by its path in the package. vllm_standin_model.py has the decoder.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from bench.offline.vllm_standin_lora import LoRAManager, LoRARequest
from bench.offline.vllm_standin_model import Cache, Model

# The models whose memory the process's allocator knows.
_models: list[weakref.ref[nn.Module]] = []


@contextmanager
def installed() -> Iterator[None]:
    """Inside, this module is vllm."""
    requests = ModuleType("vllm.lora.request")
    requests.LoRARequest = LoRARequest  # type: ignore[attr-defined]
    ours = {"vllm": sys.modules[__name__], "vllm.lora": ModuleType("vllm.lora"), "vllm.lora.request": requests}
    before = {name: sys.modules[name] for name in ours if name in sys.modules}
    sys.modules |= ours
    try:
        yield
    finally:
        for name in ours:
            del sys.modules[name]
        sys.modules |= before


@dataclass
class SamplingParams:
    """What gadcore sets of sampling_params.py: SamplingParams."""

    n: int
    temperature: float
    max_tokens: int
    seed: int
    logprobs: int
    stop_token_ids: list[int]
    ignore_eos: bool
    detokenize: bool

    def __post_init__(self) -> None:
        if (self.logprobs, self.ignore_eos, self.detokenize) != (0, True, False):
            raise NotImplementedError("the stand-in gives the sampled token's log-prob, and no text")
        # SamplingParams._verify_greedy_sampling()
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"n must be 1 when using greedy sampling, got {self.n}.")


class LLM:
    """entrypoints/llm.py: LLM, in the process that makes it, with the arguments that gadcore gives."""

    def __init__(
        self,
        *,
        model: str,
        dtype: str,
        hf_overrides: dict[str, Any],
        max_model_len: int,
        block_size: int,
        max_num_seqs: int | None,
        enable_prefix_caching: bool,
        enforce_eager: bool,
        logprobs_mode: str,
        generation_config: str,
        enable_sleep_mode: bool,
        disable_log_stats: bool,
        use_tqdm_on_load: bool,
        gpu_memory_utilization: float,
        enable_lora: bool = False,
        max_loras: int = 1,
        max_lora_rank: int = 16,
        lora_target_modules: list[str] | None = None,
    ) -> None:
        if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":
            raise RuntimeError("vLLM would run in a process of its own, and its weights could not be seen from here")
        if (logprobs_mode, generation_config) != ("processed_logprobs", "vllm"):
            raise NotImplementedError("the stand-in knows processed_logprobs, and no generation_config of a model")
        # Worker.init_device() in v1/worker/gpu_worker.py: garbage and torch's unused memory are given back first.
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        wanted = math.ceil(total * gpu_memory_utilization)
        # request_memory() in v1/worker/utils.py
        if free < wanted:
            raise ValueError(
                f"Free memory on device cuda:0 ({free}/{total}) on startup is less than desired GPU memory utilization "
                f"({gpu_memory_utilization}, {wanted}). Decrease GPU memory utilization or reduce GPU memory used by "
                "other processes."
            )
        # Worker._maybe_get_memory_pool_context() in v1/worker/gpu_worker.py; a tensor that is still held keeps its
        # memory in CuMemAllocator (device_allocator/cumem.py).
        if enable_sleep_mode and any(known() is not None for known in _models):
            raise AssertionError("CuMem allocator can only be used for one instance per process.")
        config = AutoConfig.from_pretrained(model)
        config.update(hf_overrides)
        self._model: Model | None = Model(config, getattr(torch, dtype), max_model_len)
        self._model.load(Path(model))
        self._lora: LoRAManager | None = None
        if enable_lora:
            self._lora = LoRAManager(self._model, lora_target_modules or [], max_loras, max_lora_rank)
        _models.append(weakref.ref(self._model))
        blocks = self._blocks(wanted, config, block_size, max_model_len)
        self._cache = Cache(self._model, blocks, block_size, enabled=enable_prefix_caching)
        # EngineArgs.get_batch_defaults() in engine/arg_utils.py, for all but an A100
        limit = max_num_seqs or (1024 if total >= 70 * 2**30 else 256)
        self._sleep_mode, self._graphs, self._max_model_len = enable_sleep_mode, not enforce_eager, max_model_len
        self._asleep: set[str] = set()
        self._buffers: dict[str, Tensor] = {}
        self._waiting: list[tuple[str, list[int], SamplingParams]] = []
        self._addresses = self._captured()
        self.request_counter = SimpleNamespace(counter=0)
        self.llm_engine = SimpleNamespace(
            step=self._step,
            engine_core=SimpleNamespace(shutdown=self._shutdown),
            vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=limit)),
        )

    def _blocks(self, wanted: int, config: PreTrainedConfig, block_size: int, max_model_len: int) -> int:
        """Blocks of the KV cache: what is left of the memory, without what a real vLLM needs for activations and
        graphs (Worker.determine_available_memory() in v1/worker/gpu_worker.py)."""
        model = self._live()
        left = wanted - sum(t.nbytes for t in [*model.parameters(), *model.buffers(), *self._slot()])
        heads, width = config.num_key_value_heads, model.head_dim
        size = 2 * len(model.model.layers) * block_size * heads * width * model.dtype.itemsize
        # _check_enough_kv_cache_memory() in v1/core/kv_cache_utils.py
        if left // size < -(-max_model_len // block_size):
            raise ValueError(
                f"To serve at least one request with the models's max seq len ({max_model_len}), more KV cache memory "
                f"is needed than the available {left} bytes. Try increasing `gpu_memory_utilization`."
            )
        return int(left // size)

    def apply_model(self, function: Callable[[nn.Module], Any]) -> list[Any]:
        return [function(self._live())]

    def collective_rpc(self, method: Callable[[Any], Any]) -> list[Any]:
        runner = SimpleNamespace(kv_caches=self._cache.tensors, lora_manager=self._lora)
        return [method(SimpleNamespace(model_runner=runner))]

    def _slot(self) -> list[Tensor]:
        return [] if self._lora is None else list(self._lora.tensors())

    def reset_prefix_cache(self) -> bool:
        # BlockPool.reset_prefix_cache() in v1/core/block_pool.py: not while a request holds blocks.
        if self._waiting:
            return False
        self._cache.reset()
        return True

    def sleep(self, level: int = 1) -> None:
        """Level 2 alone: no copies of weights and KV cache are kept."""
        if level != 2 or not self._sleep_mode:
            raise NotImplementedError(f"sleep({level}) with enable_sleep_mode = {self._sleep_mode}")
        model = self._live()
        # EngineCore.sleep() in v1/engine/core.py resets the prefix cache, Executor.sleep() in v1/executor/abstract.py
        # returns where the weights sleep already.
        self._cache.reset()
        if "weights" in self._asleep:
            return
        # Worker.sleep() in v1/worker/gpu_worker.py: buffers are kept, parameters are not.
        self._buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        _unmap([*model.parameters(), *model.buffers(), *self._slot()])
        if self._lora is not None:
            self._lora.sleep()
        if "kv_cache" not in self._asleep:
            _unmap(self._cache.tensors)
        # CuMemAllocator.sleep() in device_allocator/cumem.py
        gc.collect()
        torch.cuda.empty_cache()
        self._asleep = {"weights", "kv_cache"}

    def wake_up(self, tags: Sequence[str] | None = None) -> bool:
        # Executor.wake_up() in v1/executor/abstract.py only warns of these, and then does nothing.
        if not self._asleep or not self._asleep.issuperset(tags or ()):
            raise RuntimeError(f"{tags or 'nothing'} does not sleep, but {sorted(self._asleep)}")
        model = self._live()
        for tag in tags or sorted(self._asleep):
            if tag == "weights":
                # CuMemAllocator.wake_up() in device_allocator/cumem.py: memory with anything in it.
                _map([*model.parameters(), *model.buffers(), *self._slot()])
                # Worker.wake_up() in v1/worker/gpu_worker.py
                for name, buffer in model.named_buffers():
                    buffer.copy_(self._buffers[name])
            else:
                _map(self._cache.tensors)
            self._asleep.remove(tag)
        self._addresses = self._captured()
        return not self._asleep

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        params: Sequence[SamplingParams],
        use_tqdm: bool,
        lora_request: LoRARequest | None = None,
    ) -> list[RequestOutput]:
        if lora_request is not None and self._lora is None:
            # InputProcessor._validate_lora() in v1/engine/input_processor.py
            raise ValueError(f"Got lora_request {lora_request} but LoRA is not enabled!")
        self._lora_request = lora_request
        if self._asleep:
            # EngineCore.wake_up() in v1/engine/core.py resumes the scheduler once all is awake: until then no request
            # is ever finished, and LLM.generate() does not return.
            raise RuntimeError(f"vLLM would wait for ever: {sorted(self._asleep)} still sleep")
        # What was captured in CUDA graphs is computed from where it lay then: CuMemAllocator maps memory where it was.
        if self._graphs and self._captured() != self._addresses:
            raise RuntimeError("vLLM's CUDA graphs would read weights from where they lay before")
        for prompt, settings in zip(prompts, params, strict=True):
            # LLM._add_request() in entrypoints/llm.py numbers requests through.
            self._waiting.append((str(self.request_counter.counter), prompt["prompt_token_ids"], settings))
            self.request_counter.counter += 1
        done: list[RequestOutput] = []
        while self._waiting:
            done += self.llm_engine.step()
        return sorted(done, key=lambda output: int(output.request_id))

    @torch.no_grad()
    def _step(self) -> list[RequestOutput]:
        # In another order than they came, as requests of different lengths are finished.
        number, prompt, settings = self._waiting.pop()
        return [RequestOutput(number, [self._sample(prompt, settings, index) for index in range(settings.n)])]

    def _sample(self, prompt: list[int], settings: SamplingParams, index: int) -> CompletionOutput:
        # InputProcessor in v1/engine/input_processor.py refuses longer prompts, the scheduler ends longer texts.
        if len(prompt) >= self._max_model_len:
            raise ValueError(f"the prompt has {len(prompt)} tokens, of {self._max_model_len} of the model")
        # ParentRequest._get_child_sampling_params() in v1/engine/parallel_sampling.py
        generator = torch.Generator().manual_seed(settings.seed + index)
        output = CompletionOutput(index)
        tokens = list(prompt)
        with self._cache.sequence(tokens) as sequence:
            while len(output.token_ids) < settings.max_tokens and len(tokens) < self._max_model_len:
                # Sampler.sample() in v1/worker/gpu/sample/sampler.py: float32, divided by the temperature; the
                # log-probs are those of what was sampled from.
                if self._lora is not None:
                    self._lora.set_active_adapters(self._lora_request, len(tokens) - sequence.computed)
                logits = self._live()(tokens, sequence).float() / (settings.temperature or 1.0)
                noise = -torch.empty_like(logits).exponential_(generator=generator).log()
                token = int((logits + noise if settings.temperature else logits).argmax())
                output.logprobs.append({token: SimpleNamespace(logprob=logits.log_softmax(-1)[token].item())})
                output.token_ids.append(token)
                tokens.append(token)
                if token in settings.stop_token_ids:
                    break
        return output

    def _captured(self) -> list[int]:
        return [tensor.data_ptr() for tensor in [*self._live().parameters(), *self._slot()]]

    def _live(self) -> Model:
        if self._model is None:
            raise RuntimeError("this vLLM was shut down")
        return self._model

    def _shutdown(self) -> None:
        # my_free() in csrc/cumem_allocator.cpp of vLLM's sources unmaps what it frees: what sleeps was unmapped.
        if self._asleep:
            raise RuntimeError("CUDA Error: invalid argument at csrc/cumem_allocator.cpp")
        # GPUModelRunner.shutdown() in v1/worker/gpu/model_runner.py
        self._model = self._lora = None
        self._cache.tensors.clear()


@dataclass
class CompletionOutput:
    """outputs.py"""

    index: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Any]] = field(default_factory=list)


@dataclass
class RequestOutput:
    """outputs.py"""

    request_id: str
    outputs: list[CompletionOutput]
    finished: bool = True


def _unmap(tensors: Sequence[Tensor]) -> None:
    """Takes the memory of tensors away: they keep their shapes, read as NaN, and cannot be written."""
    for tensor in tensors:
        tensor.data = torch.full((), math.nan, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _map(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.data = torch.full(tensor.shape, math.nan, dtype=tensor.dtype, device=tensor.device)
