"""vLLM inside the trainer's process, alone or on every rank.

Where trainer and engine hold the weights in the same dtype on the same device, there is one copy of them: every
trainer parameter becomes a view into vLLM's (q, k, v are rows of qkv_proj, gate and up of gate_up_proj), and an
optimizer step *is* the weight update. Elsewhere update_weights() copies into vLLM's storage, cast on the way, and from
shards on several ranks moves what each one's part of vLLM lacks (gadcore.distributed.reshard). Ranks that train an
adapter have all of the model, and each a vLLM of its own as one process has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gadcore import cpu
from gadcore.config.settings import Config
from gadcore.data.groups import Response
from gadcore.data.template import ChatTemplate
from gadcore.distributed.world import ALONE, World
from gadcore.errors import foreign
from gadcore.kernels.quantised_linear import layers_of_bits
from gadcore.memory.holdings import EnginePart, Holding
from gadcore.memory.resident import drop_pages, resident_bytes
from gadcore.rollout.engine import Done, Engine, SampleRequest, There
from gadcore.rollout.probe import check_distribution, sample_for_check
from gadcore.rollout.replicas import Replicas
from gadcore.rollout.vllm_adapter import (
    AdaptedWeights,
    Adapter,
    has_adapter,
    in_slots,
    install_adapter,
    lora_arguments,
)
from gadcore.rollout.vllm_classes import TrainersClasses
from gadcore.rollout.vllm_shards import ShardedWeights
from gadcore.rollout.vllm_start import check_gpu, check_ranks, import_vllm, start
from gadcore.rollout.vllm_weights import WholeWeights
from gadcore.rollout.weights import PlainWeights, WeightSource


class VLLMEngine(Engine):
    """vLLM as an Engine, sampling from the weights of `model`, which was loaded from the directory `model_path`."""

    holds_memory = True
    batches_prompts = True
    spans_ranks = True

    @classmethod
    def make(
        cls,
        config: Config,
        model_path: str,
        model: PreTrainedModel,
        template: ChatTemplate,
        there: There,
        world: World = ALONE,
    ) -> Engine:
        # It looks at the free memory of a GPU when it starts.
        return cls(config, model_path, model, template, there, world)

    @classmethod
    def shares_weights(cls, config: Config, device: str, ranks: int = 1) -> bool:
        # On CUDA a sleeping vLLM's weights are unmapped, so there the trainer keeps its own; so it does in shards, and
        # in bits that vLLM does not read.
        whole = ranks == 1 or config.student.adapter != "none"
        same = config.vllm.dtype == config.student.weights_dtype and config.student.adapter_base == "none"
        return device == "cpu" and whole and same and config.memory.shared_weights

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
        world: World = ALONE,
    ) -> None:
        """there, world: see make(); default the weights are there, and this process is alone."""
        settings = config.vllm
        self.template = template
        self.on_cpu = model.device.type == "cpu"
        self.eager = settings.eager(model.device.type)
        check_ranks(settings, world)
        self._replicas = Replicas(world, settings.tensor_parallel)
        if not self.on_cpu:
            check_gpu(settings)
        self.vllm = import_vllm(settings, cpu.decoding_linear() if self.on_cpu else None)
        slots = has_adapter(model) and in_slots(self.on_cpu)
        lora = lora_arguments(model) if slots else None
        classes = TrainersClasses(model)
        engine_models: list[nn.Module] = []
        with foreign(f"vLLM cannot run the model {model_path}", 'rollout.engine = "hf" may'):
            try:
                self.llm = start(self.vllm, config, model_path, world, on_cpu=self.on_cpu, eager=self.eager, lora=lora)
                engine_models = self.llm.apply_model(lambda m: m)
            finally:
                classes.restore(engine_models)
        (self.engine_model,) = engine_models
        self.adapter: Adapter | None = None
        if has_adapter(model) and not slots:
            # Before anything looks at the layers.
            with there(), foreign(f"vLLM cannot run the model {model_path} with an adapter"):
                self.adapter = install_adapter(self.llm, model, self.engine_model, slots=False)
        if self.on_cpu and self.eager and not slots:
            cpu.adapt_vllm(self.llm)
        self.notes = [] if self.on_cpu else [self._resolved()]
        self._kv_cache = self._find_kv_cache()
        self.shared = self.shares_weights(config, model.device.type, world.size)
        self._awake: set[EnginePart] = {"weights", "kv_cache"}
        # vLLM's weights are those of the directory, as the trainer's are, which match() sees to.
        self._current = True
        self.sync: WholeWeights | ShardedWeights
        # The trainer's are not, where an adapter comes after vLLM has started, or few bits stand for them.
        few = layers_of_bits(model).keys()
        brought = slots or bool(few)
        if brought:
            with foreign(f"vLLM cannot run the model {model_path} with an adapter"):
                self._bring(AdaptedWeights(self.engine_model, self.adapter, shared=self.shared, few=few), model, there)
        prompt, tokens = sample_for_check(model, config.context_tokens)
        with foreign(f"vLLM cannot run the model {model_path}", 'rollout.engine = "hf" may'):
            # Whether there is a kernel for its shapes shows here.
            ((sample,),) = self._draw([SampleRequest(prompt, 1, 0)], temperature=1.0, max_tokens=tokens)
            if world.size > 1 and not has_adapter(model):
                self.sync = ShardedWeights(self.engine_model, model, world)
            elif self.adapter is not None and not brought:
                self.sync = AdaptedWeights(self.engine_model, self.adapter, shared=self.shared)
            elif not brought:
                self.sync = WholeWeights(self.engine_model, shared=self.shared)
        if not self.on_cpu:
            # The trainer's weights find the room that vLLM had.
            self.sleep()
        with there():
            with foreign(f"vLLM cannot run the model {model_path}", 'rollout.engine = "hf" may'):
                if not brought:
                    self.sync.match(model)
            if self.shared and not brought:
                self._share(model)
            check_distribution(model, model_path, self.dtype(config), prompt, sample)
        self.sleep()

    def _bring(self, sync: AdaptedWeights, model: PreTrainedModel, there: There) -> None:
        """Gives vLLM the trainer's weights before it has drawn anything, in the order of a step: there may be no room
        for them and for a key-value cache at a time."""
        self.sync = sync
        self.sleep()
        self.wake("weights")
        with there():
            if self.adapter is None:
                self.adapter = sync.adapter = install_adapter(self.llm, model, self.engine_model, slots=True)
            sync.match(model)
            if self.shared:
                self._share(model)
            self.update_weights(PlainWeights(model))
        self.wake("kv_cache")

    def _resolved(self) -> str:
        """What settings that the device decides have become."""
        sequences = self.llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
        graphs = "without CUDA graphs" if self.eager else "with CUDA graphs"
        return f"vLLM samples up to {sequences} sequences at a time, {graphs}"

    def _share(self, model: PreTrainedModel) -> None:
        views = self.weights()
        assert isinstance(self.sync, WholeWeights)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if self.sync.is_view(name):
                    views[name].copy_(p)
                    p.data = views[name]

    def weights(self) -> dict[str, Tensor]:
        return self.sync.named()

    def _find_kv_cache(self) -> list[Tensor]:
        (caches,) = self.llm.collective_rpc(lambda worker: worker.model_runner.kv_caches)
        return list({cache.data_ptr(): cache for cache in caches}.values())

    def generate(
        self, requests: Sequence[SampleRequest], *, temperature: float, max_tokens: int, done: Done | None = None
    ) -> list[list[Response]]:
        if not self._current or "kv_cache" not in self._awake:
            raise RuntimeError("the engine has slept: wake its weights, update them, then wake its key-value cache")
        return self._replicas.draw(
            requests,
            lambda mine, told: self._draw(mine, temperature=temperature, max_tokens=max_tokens, done=told),
            done,
        )

    def _draw(
        self, requests: Sequence[SampleRequest], *, temperature: float, max_tokens: int, done: Done | None = None
    ) -> list[list[Response]]:
        """Of this rank's sampler."""
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
        self.sync.update(source)
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
            for tensor in [*self._kv_cache, *([] if self.shared else self.sync.own())]:
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
        weights = 0 if self.shared or "weights" not in self._awake else sum(w.nbytes for w in self.sync.own())
        cache = 0
        if "kv_cache" in self._awake:
            # On the CPU the blocks that were never used take no memory.
            cache = sum(resident_bytes(c) if self.on_cpu else c.nbytes for c in self._kv_cache)
        return {"engine.weights": weights, "engine.kv_cache": cache}

    def aliases(self) -> list[Tensor]:
        return self.sync.aliases() if self.shared and isinstance(self.sync, WholeWeights) else []

    def close(self) -> None:
        if not self.on_cpu and len(self._awake) < 2:
            # vLLM frees memory that sleeps by unmapping it once more, which the driver refuses (my_free() in
            # csrc/cumem_allocator.cpp). Where there is no room to wake it, the end of the process frees it.
            parts = {"weights": self.sync.own(), "kv_cache": self._kv_cache}
            asleep = sum(t.nbytes for part, tensors in parts.items() if part not in self._awake for t in tensors)
            torch.cuda.empty_cache()
            if torch.cuda.mem_get_info()[0] < asleep:
                return
            self.llm.wake_up()
        # What vLLM is to free must not be held here.
        del self.engine_model, self._kv_cache, self.sync
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
