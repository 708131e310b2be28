"""vLLM inside the trainer's process.

Where trainer and engine hold the weights in the same dtype on the same device, there is one copy of them: every
trainer parameter becomes a view into vLLM's (q, k, v are rows of qkv_proj, gate and up of gate_up_proj), and an
optimizer step *is* the weight update. Elsewhere update_weights() copies into vLLM's storage, cast on the way.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gadcore import cpu
from gadcore.config.rollout import VLLMRollout
from gadcore.config.settings import Config
from gadcore.data.groups import Response
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError, foreign
from gadcore.kernels.cast_copy import cast_copy
from gadcore.kernels.lora_linear import is_adapters
from gadcore.memory.holdings import EnginePart, Holding
from gadcore.memory.resident import drop_pages, resident_bytes
from gadcore.rollout.engine import Done, Engine, SampleRequest, There
from gadcore.rollout.vllm_adapter import Adapter, AdapterInProducts, AdapterInSlot, has_adapter, lora_arguments
from gadcore.rollout.vllm_classes import TrainersClasses
from gadcore.rollout.vllm_weights import engine_parameters, lay_out, map_weights
from gadcore.rollout.weights import WeightSource, checksums, row_sums

# How far log-probs of a sample may lie from the trainer's, in the mean, by the engine's dtype: rounding, and no more.
_DIFFERENCE = {"float32": 0.01, "bfloat16": 0.2}


def _import_vllm(settings: VLLMRollout, on_cpu: bool):  # type: ignore[no-untyped-def]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if on_cpu:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings.kv_cache_gib)
        # The trainer's threads are not vLLM's to bind.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        import vllm.model_executor.layers.utils as layer_utils

        layer_utils.dispatch_cpu_unquantized_gemm = _plain_cpu_linear
    else:
        # Read by vLLM as it is imported, too.
        os.environ["VLLM_BATCH_INVARIANT"] = str(int(settings.batch_invariant))
        # vLLM would let Triton print of the trainer's kernels (vllm/utils/jit_monitor.py).
        os.environ.setdefault("TRITON_PRINT_AUTOTUNING", "0")
    import vllm

    return vllm


def _check_gpu(settings: VLLMRollout) -> None:
    """Raises UserError where vLLM cannot be started on the GPU with these settings."""
    if settings.batch_invariant and torch.cuda.get_device_capability() < (9, 0):
        # enable_batch_invariant_mode() in vllm/model_executor/determinism/batch_invariant.py: aten::matmul and
        # aten::linear of the whole process get kernels without a backward pass.
        raise UserError(
            "batch_invariant = true needs a GPU of compute capability 9.0 or later: on others vLLM replaces matrix "
            "products of the trainer by some that have no gradient: leave it at false"
        )
    # vLLM asks the same (request_memory() in vllm/v1/worker/utils.py), and knows no setting of ours by name. It counts
    # what torch keeps without using it as taken until it has given that back itself.
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    wanted = math.ceil(total * settings.gpu_memory_utilization)
    if free < wanted:
        raise UserError(
            f"gpu_memory_utilization = {settings.gpu_memory_utilization} asks for {wanted / 1e9:.1f} GB of the GPU for "
            f"vLLM, and {free / 1e9:.1f} of its {total / 1e9:.1f} GB are free: lower it, or end what else uses the GPU"
        )


def _in_slots(on_cpu: bool) -> bool:
    """Whether an adapter is in vLLM's own LoRA layers: elsewhere than on a CPU, where these are many times slower."""
    return not on_cpu


def _plain_cpu_linear(layer: nn.Module, remove_weight: bool) -> None:
    """Takes the place of vllm's dispatch_cpu_unquantized_gemm, before a model is loaded."""
    # vLLM's own CPU layers repack their weights and empty the originals; later updates then fail, one of them
    # (the tied output head) without an error.
    layer.cpu_linear = cpu.decoding_linear()


class VLLMEngine(Engine):
    """vLLM as an Engine, sampling from the weights of `model`, which was loaded from the directory `model_path`."""

    holds_memory = True
    batches_prompts = True
    spans_ranks = True

    @classmethod
    def make(
        cls, config: Config, model_path: str, model: PreTrainedModel, template: ChatTemplate, there: There
    ) -> Engine:
        # It looks at the free memory of a GPU when it starts.
        return cls(config, model_path, model, template, there)

    @classmethod
    def shares_weights(cls, config: Config, device: str) -> bool:
        # On CUDA a sleeping vLLM's weights are unmapped, so there the trainer keeps its own.
        same = config.vllm.dtype == config.student.weights_dtype
        return device == "cpu" and same and config.memory.shared_weights

    @classmethod
    def dtype(cls, config: Config) -> str:
        return config.vllm.dtype

    @classmethod
    def one_a_process(cls, device: str) -> bool:
        # The allocator that lets vLLM sleep is one for a process, and serves a second vLLM only where no tensor of the
        # first is left (Worker._maybe_get_memory_pool_context() in vllm/v1/worker/gpu_worker.py). close() lets go of
        # ours; whether torch.compile, CUDA graphs and vLLM's own caches did is not for us to say.
        return device == "cuda"

    def __init__(
        self,
        config: Config,
        model_path: str,
        model: PreTrainedModel,
        template: ChatTemplate,
        there: There = nullcontext,
    ) -> None:
        """there: see make(); default the weights are there."""
        settings = config.vllm
        self.template = template
        self.on_cpu = model.device.type == "cpu"
        self.eager = settings.eager(model.device.type)
        if not self.on_cpu:
            _check_gpu(settings)
        self.vllm = _import_vllm(settings, self.on_cpu)
        adapted = has_adapter(model)
        slots = adapted and _in_slots(self.on_cpu)
        classes = TrainersClasses(model)
        engine_models: list[nn.Module] = []
        with foreign(f"vLLM cannot run the model {model_path}", 'rollout.engine = "hf" may'):
            try:
                self.llm = self._start(config, model_path, lora_arguments(model) if slots else {})
                engine_models = self.llm.apply_model(lambda m: m)
            finally:
                classes.restore(engine_models)
        (self.engine_model,) = engine_models
        self.adapter: Adapter | None = None
        if adapted:
            # Before anything looks at the layers. An adapter may wait elsewhere, its base never does.
            with there(), foreign(f"vLLM cannot run the model {model_path} with an adapter"):
                slices = lay_out(model, self.engine_model)
                self.adapter = (
                    AdapterInSlot(self.llm, model, slices)
                    if slots
                    else AdapterInProducts(model, self.engine_model, slices)
                )
        if self.on_cpu and self.eager and not slots:
            cpu.adapt_vllm(self.llm)
        self.notes = [] if self.on_cpu else [self._resolved()]
        self._kv_cache = self._find_kv_cache()
        self.shared = self.shares_weights(config, model.device.type)
        self._awake: set[EnginePart] = {"weights", "kv_cache"}
        # vLLM's weights are those of the directory, as the trainer's are, which map_weights() sees to.
        self._current = True
        prompt, sample = self._sample_once(model, config)
        loaded = {name: row_sums(p) for name, p in engine_parameters(self.engine_model).items()}
        if not self.on_cpu:
            # The trainer's weights find the room that vLLM had.
            self.sleep()
        with there():
            with foreign(f"vLLM cannot run the model {model_path}", 'rollout.engine = "hf" may'):
                self.slices = map_weights(model, self.engine_model, loaded)
            if self.shared:
                self._share(model)
            self._check_distribution(model, config, model_path, prompt, sample)
        self.sleep()

    def _start(self, config: Config, model_path: str, lora: Mapping[str, Any]) -> Any:
        rollout = config.vllm
        # The trainer's logits are float32, made of bfloat16 products; so are these, then (LogitsProcessor in
        # vllm/model_executor/layers/logits_processor.py). The head's weights stay what they are, tied or not.
        head = {"head_dtype": rollout.head_dtype} if rollout.dtype != rollout.head_dtype == "float32" else {}
        return self.vllm.LLM(
            model=model_path,
            dtype=rollout.dtype,
            hf_overrides=head,
            max_model_len=config.context_tokens,
            block_size=rollout.block_size,
            # None is vLLM's own limit.
            max_num_seqs=rollout.sequences_at_once("cpu", 0, "") if self.on_cpu else rollout.max_num_seqs,
            enable_prefix_caching=rollout.prefix_caching,
            # CUDA graphs hold addresses. Those of weights and KV cache stay over sleep and wake, which unmap and map
            # them again (vllm/device_allocator/cumem.py), and over updates, which write in place. What graphs need for
            # themselves is within gpu_memory_utilization, and stays while vLLM sleeps.
            enforce_eager=self.eager,
            # Log-probs after the temperature, as the trainer computes them.
            logprobs_mode="processed_logprobs",
            # The model's own generation_config is neither read nor obeyed.
            generation_config="vllm",
            enable_sleep_mode=not self.on_cpu,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **lora,
            **(
                # Where only a part of a seeded prompt fits into a batch, vLLM turns back its generator, which a CPU's
                # cannot: whole prompts then.
                {"enable_chunked_prefill": False}
                if self.on_cpu
                else {"gpu_memory_utilization": rollout.gpu_memory_utilization}
            ),
        )

    def _resolved(self) -> str:
        """What settings that the device decides have become."""
        sequences = self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        graphs = "without CUDA graphs" if self.eager else "with CUDA graphs"
        return f"vLLM samples up to {sequences} sequences at a time, {graphs}"

    def _sample_once(self, model: PreTrainedModel, config: Config) -> tuple[tuple[int, ...], Response]:
        """A prompt and a sample for it."""
        tokens = max(1, min(8, config.context_tokens // 2))
        prompt = tuple(1 + 7 * i % (model.config.get_text_config().vocab_size - 1) for i in range(tokens))
        ((sample,),) = self.generate([SampleRequest(prompt, 1, 0)], temperature=1.0, max_tokens=tokens)
        return prompt, sample

    def _check_distribution(
        self, model: PreTrainedModel, config: Config, model_path: str, prompt: tuple[int, ...], sample: Response
    ) -> None:
        """Raises UserError where a sample's log-probs are not the trainer's, equal weights or not."""
        ids = torch.tensor([[*prompt, *sample.token_ids]], device=model.device)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        found = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
        difference = (found - torch.tensor(sample.logprobs, device=found.device)).abs().mean().item()
        if not difference < _DIFFERENCE[self.dtype(config)]:
            raise UserError(
                f"vLLM does not compute what the trainer does for the model {model_path} ({model.config.model_type}): "
                f'log-probs of a sample differ by {difference:.2g} in the mean; set rollout.engine = "hf"'
            )

    def _share(self, model: PreTrainedModel) -> None:
        views = self.weights()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if self._is_view(name):
                    views[name].copy_(p)
                    p.data = views[name]

    def weights(self) -> dict[str, Tensor]:
        engine = engine_parameters(self.engine_model)
        base = {s.name: engine[s.vllm_name].data[s.start : s.end] for s in self.slices}
        return base if self.adapter is None else base | self.adapter.weights()

    def _find_kv_cache(self) -> list[Tensor]:
        (caches,) = self.llm.collective_rpc(lambda worker: worker.model_runner.kv_caches)
        return list({cache.data_ptr(): cache for cache in caches}.values())

    def generate(
        self, requests: Sequence[SampleRequest], *, temperature: float, max_tokens: int, done: Done | None = None
    ) -> list[list[Response]]:
        if not self._current or "kv_cache" not in self._awake:
            raise RuntimeError("the engine has slept: wake its weights, update them, then wake its key-value cache")
        prompts = [{"prompt_token_ids": list(r.prompt_ids)} for r in requests]
        params = [
            self.vllm.SamplingParams(
                n=r.n if temperature > 0 else 1,
                temperature=temperature,
                max_tokens=max_tokens,
                seed=r.seed,
                logprobs=0,
                # The template's end marker ends a response and nothing else does, as for the teacher's text.
                stop_token_ids=[self.template.end_id],
                ignore_eos=True,
                detokenize=False,
            )
            for r in requests
        ]
        request = None if self.adapter is None else self.adapter.request
        lora = {} if request is None else {"lora_request": request}
        with self._telling(requests, done) if done else nullcontext():
            outputs = self.llm.generate(prompts, params, use_tqdm=False, **lora)
        return [self._responses(request, output) for request, output in zip(requests, outputs, strict=True)]

    @contextmanager
    def _telling(self, requests: Sequence[SampleRequest], done: Done) -> Iterator[None]:
        """Tells of every request as soon as it is finished, while the block makes vLLM generate."""
        # vLLM numbers its requests through.
        engine, first = self.llm.llm_engine, self.llm.request_counter.counter
        step = engine.step

        def watched() -> list[Any]:
            outputs: list[Any] = step()
            for output in outputs:
                if output.finished:
                    place = int(output.request_id) - first
                    done(place, self._responses(requests[place], output))
            return outputs

        engine.step = watched
        try:
            yield
        finally:
            engine.step = step

    def _responses(self, request: SampleRequest, output: Any) -> list[Response]:
        samples = [self._response(sample) for sample in sorted(output.outputs, key=lambda o: o.index)]
        # Greedily all samples of a prompt are one.
        return samples if len(samples) == request.n else samples * request.n

    def _response(self, sample) -> Response:  # type: ignore[no-untyped-def]
        ids = tuple(sample.token_ids)
        logprobs = tuple(step[token].logprob for token, step in zip(ids, sample.logprobs, strict=True))
        text, finished = self.template.text_of(ids)
        return Response(text, ids, finished, logprobs)

    def update_weights(self, source: WeightSource) -> None:
        if "weights" not in self._awake:
            raise RuntimeError("the engine sleeps: wake its weights before they are updated")
        weights = self.weights()
        pairs = [(name, self._as_held(name, tensor), weights[name]) for name, tensor in source]
        views = [self._is_view(name) for name, *_ in pairs]
        if moved := [
            n for (n, t, own), view in zip(pairs, views, strict=True) if view and t.data_ptr() != own.data_ptr()
        ]:
            raise RuntimeError(f"trainer and vLLM no longer share the weights {moved[:3]}")
        if copied := [pair for pair, view in zip(pairs, views, strict=True) if not view]:
            cast_copy([(tensor, own) for _, tensor, own in copied])
            expected = checksums((name, tensor.to(own.dtype)) for name, tensor, own in copied)
            if not torch.equal(checksums((name, own) for name, _, own in copied), expected):
                raise RuntimeError("vLLM's weights differ from the trainer's after an update")
        # Cached keys and values belong to the old weights.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")
        self._current = True

    def _as_held(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if self.adapter is None else self.adapter.as_held(name, tensor)

    def _is_view(self, name: str) -> bool:
        """Whether the trainer's parameter of that name is a view into vLLM's."""
        return self.shared and (self.adapter is None or self.adapter.shared or not is_adapters(name))

    def sleep(self) -> None:
        if not self._awake:
            return
        if self.on_cpu:
            # vLLM itself has no sleep there. All that is lost is what update_weights() and a reset prefix cache make
            # anew.
            for tensor in [*self._kv_cache, *([] if self.shared else self._own_weights())]:
                drop_pages(tensor)
        else:
            # Level 2 keeps no copy of the weights: the trainer's are newer.
            self.llm.sleep(level=2)
        self._awake = set()
        self._current = self.shared

    def wake(self, part: EnginePart) -> None:
        if part in self._awake:
            return
        if not self.on_cpu:
            self.llm.wake_up(tags=[part])
        self._awake.add(part)

    def held(self) -> dict[Holding, int]:
        weights = 0 if self.shared or "weights" not in self._awake else sum(w.nbytes for w in self._own_weights())
        cache = 0
        if "kv_cache" in self._awake:
            # On the CPU the blocks that were never used take no memory.
            cache = sum(resident_bytes(c) if self.on_cpu else c.nbytes for c in self._kv_cache)
        return {"engine.weights": weights, "engine.kv_cache": cache}

    def aliases(self) -> list[Tensor]:
        if not self.shared:
            return []
        # What lies under an adapter stays where it is.
        return self._own_weights() if self.adapter is None else list(self.adapter.aliases())

    def _own_weights(self) -> list[Tensor]:
        """vLLM's parameters that the trainer's lie in."""
        engine = engine_parameters(self.engine_model)
        return [engine[name] for name in dict.fromkeys(s.vllm_name for s in self.slices)]

    def close(self) -> None:
        if not self.on_cpu and len(self._awake) < 2:
            # vLLM frees memory that sleeps by unmapping it once more, which the driver refuses (my_free() in
            # csrc/cumem_allocator.cpp). Where there is no room to wake it, the end of the process frees it.
            parts = {"weights": self._own_weights(), "kv_cache": self._kv_cache}
            asleep = sum(t.nbytes for part, tensors in parts.items() if part not in self._awake for t in tensors)
            torch.cuda.empty_cache()
            if torch.cuda.mem_get_info()[0] < asleep:
                return
            self.llm.wake_up()
        # What vLLM is to free must not be held here.
        del self.engine_model, self._kv_cache
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
