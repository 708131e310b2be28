"""vLLM inside the trainer's process.

Where trainer and engine hold the weights in the same dtype on the same device, there is one copy of them: every
trainer parameter becomes a view into vLLM's (q, k, v are rows of qkv_proj, gate and up of gate_up_proj), and an
optimizer step *is* the weight update. Elsewhere update_weights() copies into vLLM's storage, cast on the way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gadcore import cpu
from gadcore.config.settings import Config
from gadcore.data.groups import Response
from gadcore.data.template import ChatTemplate
from gadcore.errors import UserError, foreign
from gadcore.kernels.cast_copy import cast_copy
from gadcore.memory.holdings import EnginePart, Holding
from gadcore.memory.resident import drop_pages, resident_bytes
from gadcore.rollout.engine import Done, Engine, SampleRequest, There
from gadcore.rollout.vllm_classes import TrainersClasses
from gadcore.rollout.weights import PlainWeights, WeightSource, checksums

# How far log-probs of a sample may lie from the trainer's, in the mean, by the engine's dtype: rounding, and no more.
_DIFFERENCE = {"float32": 0.01, "bfloat16": 0.2}


@dataclass(frozen=True)
class Slice:
    """A trainer parameter is rows start .. end - 1 of one of vLLM's parameters."""

    name: str
    vllm_name: str
    start: int
    end: int


def _import_vllm(on_cpu: bool, kv_cache_gib: int):  # type: ignore[no-untyped-def]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if on_cpu:
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(kv_cache_gib)
        # The trainer's threads are not vLLM's to bind.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        import vllm.model_executor.layers.utils as layer_utils

        layer_utils.dispatch_cpu_unquantized_gemm = _plain_cpu_linear
    import vllm

    return vllm


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

    def __init__(
        self,
        config: Config,
        model_path: str,
        model: PreTrainedModel,
        template: ChatTemplate,
        there: There = nullcontext,
    ) -> None:
        """there: see make(); default the weights are there."""
        self.template = template
        self.on_cpu = model.device.type == "cpu"
        self.vllm = _import_vllm(self.on_cpu, config.vllm.kv_cache_gib)
        classes = TrainersClasses(model)
        engine_models: list[nn.Module] = []
        try:
            with foreign(f"vLLM cannot run the model {model_path}", 'rollout.engine = "hf" may'):
                self.llm = self._start(config, model_path)
                engine_models = self.llm.apply_model(lambda m: m)
                (self.engine_model,) = engine_models
                with there():
                    self.slices = map_weights(model, self.engine_model)
        finally:
            classes.restore(engine_models)
        if self.on_cpu and config.vllm.enforce_eager:
            cpu.adapt_vllm(self.llm)
        self._kv_cache = self._find_kv_cache()
        self.shared = self.shares_weights(config, model.device.type)
        if self.shared:
            self._share(model)
        self._awake: set[EnginePart] = {"weights", "kv_cache"}
        self._current = False
        with there():
            self.update_weights(PlainWeights(model))
            self._check_distribution(model, config, model_path)
        self.sleep()

    def _start(self, config: Config, model_path: str) -> Any:
        rollout = config.vllm
        return self.vllm.LLM(
            model=model_path,
            dtype=rollout.dtype,
            max_model_len=config.context_tokens,
            block_size=rollout.block_size,
            max_num_seqs=rollout.max_num_seqs,
            enable_prefix_caching=rollout.prefix_caching,
            enforce_eager=rollout.enforce_eager,
            # Log-probs after the temperature, as the trainer computes them.
            logprobs_mode="processed_logprobs",
            # The model's own generation_config is neither read nor obeyed.
            generation_config="vllm",
            enable_sleep_mode=not self.on_cpu,
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **(
                # Where only a part of a seeded prompt fits into a batch, vLLM turns back its generator, which a CPU's
                # cannot: whole prompts then.
                {"enable_chunked_prefill": False}
                if self.on_cpu
                else {"gpu_memory_utilization": rollout.gpu_memory_utilization}
            ),
        )

    def _check_distribution(self, model: PreTrainedModel, config: Config, model_path: str) -> None:
        """Raises UserError where a sample's log-probs are not the trainer's, equal weights or not."""
        tokens = max(1, min(8, config.context_tokens // 2))
        prompt = tuple(1 + 7 * i % (model.config.get_text_config().vocab_size - 1) for i in range(tokens))
        ((sample,),) = self.generate([SampleRequest(prompt, 1, 0)], temperature=1.0, max_tokens=tokens)
        ids = torch.tensor([[*prompt, *sample.token_ids]], device=model.device)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, tokens - 1 : -1].float()
        found = logits.log_softmax(-1).gather(-1, ids[0, tokens:, None])[:, 0]
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
                views[name].copy_(p)
                p.data = views[name]

    def weights(self) -> dict[str, Tensor]:
        engine = dict(self.engine_model.named_parameters())
        return {s.name: engine[s.vllm_name].data[s.start : s.end] for s in self.slices}

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
        with self._telling(requests, done) if done else nullcontext():
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
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
        pairs = [(name, tensor, weights[name]) for name, tensor in source]
        if self.shared:
            if moved := [name for name, tensor, own in pairs if tensor.data_ptr() != own.data_ptr()]:
                raise RuntimeError(f"trainer and vLLM no longer share the weights {moved[:3]}")
        else:
            cast_copy([(tensor, own) for _, tensor, own in pairs])
            expected = checksums((name, tensor.to(own.dtype)) for name, tensor, own in pairs)
            if not torch.equal(checksums((name, own) for name, _, own in pairs), expected):
                raise RuntimeError("vLLM's weights differ from the trainer's after an update")
        # Cached keys and values belong to the old weights.
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")
        self._current = True

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
        return self._own_weights() if self.shared else []

    def _own_weights(self) -> list[Tensor]:
        """vLLM's parameters that the trainer's lie in."""
        engine = dict(self.engine_model.named_parameters())
        return [engine[name] for name in dict.fromkeys(s.vllm_name for s in self.slices)]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def map_weights(model: PreTrainedModel, engine_model: nn.Module) -> list[Slice]:
    """Where each trainer parameter lies inside vLLM's, in the trainer's order.

    Both sides must hold the same values when this is called (they were loaded from the same directory): every
    slice is compared, to the precision of the engine's dtype. Raises RuntimeError where they do not match.
    """
    parts = {part: fused for fused, ps in getattr(engine_model, "packed_modules_mapping", {}).items() for part in ps}
    members = {fused: list(ps) for fused, ps in getattr(engine_model, "packed_modules_mapping", {}).items()}
    engine = dict(engine_model.named_parameters())
    called = {name: name if name in engine else _in_vllms_words(name, model) for name, _ in model.named_parameters()}
    rows = {called[name]: len(p) for name, p in model.named_parameters()}
    slices = []
    for name, p in model.named_parameters():
        vllm_name, start = called[name], 0
        if vllm_name not in engine:
            prefix, module, kind = _split(vllm_name)
            fused = ".".join(filter(None, (prefix, parts.get(module), kind)))
            if module not in parts or fused not in engine:
                raise RuntimeError(f"vLLM's model has no parameter for the trainer's {name}")
            before = members[parts[module]][: members[parts[module]].index(module)]
            vllm_name, start = fused, sum(rows[".".join(filter(None, (prefix, m, kind)))] for m in before)
        slices.append(Slice(name, vllm_name, start, start + len(p)))
        view = engine[vllm_name].data[start : start + len(p)]
        if not torch.equal(view, p.detach().to(view)):
            raise RuntimeError(f"the trainer's {name} is not where it was looked for in vLLM's {vllm_name}")
    # Weights that no update would reach, for example a head of its own where the trainer's is the embedding.
    if left := sorted(engine.keys() - {s.vllm_name for s in slices}):
        raise RuntimeError(f"vLLM's {left[0]} is no parameter of the trainer's")
    return slices


def _in_vllms_words(name: str, model: PreTrainedModel) -> str:
    """A parameter's name where backbone and output head are called `model` and `lm_head`, as vLLM calls them."""
    backbone, head = f"{model.base_model_prefix}.", model.get_output_embeddings()
    if name.startswith(backbone):
        return "model." + name.removeprefix(backbone)
    of_head = next((f"{n}." for n, module in model.named_modules() if module is head), backbone)
    return "lm_head." + name.removeprefix(of_head) if name.startswith(of_head) else name


def _split(name: str) -> tuple[str, str, str]:
    """'a.b.q_proj.weight' -> ('a.b', 'q_proj', 'weight')."""
    prefix, _, kind = name.rpartition(".")
    prefix, _, module = prefix.rpartition(".")
    return prefix, module, kind
