"""A small engine on Hugging Face's generate(), for tests and for machines without vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from gadcore.config.settings import Config
from gadcore.data.groups import Response
from gadcore.data.template import ChatTemplate
from gadcore.distributed.fsdp import is_sharded, local, reshard_all
from gadcore.distributed.world import ALONE, World
from gadcore.kernels.quantised_linear import layers_of_bits
from gadcore.rollout.engine import Done, Engine, SampleRequest, There
from gadcore.rollout.replicas import Replicas
from gadcore.rollout.weights import WeightSource


class HFEngine(Engine):
    """Samples from the trainer's own model object: there is no second copy of the weights.

    One prompt at a time, so that its seed alone decides its samples. Over several processes that have the model whole
    each draws its share of the prompts; of a sharded one all draw all of them, in step: nothing is faster for it.
    """

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
        with there():
            made = cls(config, model_path, model, template)
        if not is_sharded(model):
            made._replicas = Replicas(world, 1)
        return made

    def __init__(self, config: Config, model_path: str, model: PreTrainedModel, template: ChatTemplate) -> None:
        # Alone it draws all, and so does each process that has a part of the model.
        self._replicas = Replicas(ALONE, 1)
        self.model = model
        self.template = template
        asked = config.student.autocast
        self._autocast = None if asked == "none" else getattr(torch, asked)

    @torch.no_grad()
    def generate(
        self, requests: Sequence[SampleRequest], *, temperature: float, max_tokens: int, done: Done | None = None
    ) -> list[list[Response]]:
        return self._replicas.draw(
            requests,
            lambda mine, told: self._drawn(mine, temperature, max_tokens, told),
            done,
        )

    def _drawn(
        self, requests: Sequence[SampleRequest], temperature: float, max_tokens: int, done: Done | None
    ) -> list[list[Response]]:
        drawn = []
        for place, request in enumerate(requests):
            drawn.append(self._one(request, temperature, max_tokens))
            if done is not None:
                done(place, drawn[-1])
        return drawn

    def _one(self, request: SampleRequest, temperature: float, max_tokens: int) -> list[Response]:
        greedy = temperature == 0
        settings = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=not greedy,
            temperature=1.0 if greedy else temperature,
            top_k=self.model.config.get_text_config().vocab_size,
            top_p=1.0,
            min_p=0.0,
            repetition_penalty=1.0,
            num_return_sequences=1 if greedy else request.n,
            eos_token_id=self.template.end_id,
            pad_token_id=self.template.end_id,
            output_logits=True,
            return_dict_in_generate=True,
        )
        prompt = torch.tensor([request.prompt_ids], device=self.model.device)
        devices = [self.model.device] if self.model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), _nothing_of_its_own(self.model):
            torch.manual_seed(request.seed)
            # Of a sharded model every process does the same, and gathers together with the others, as narrow as
            # autocast reads it.
            narrow = self._autocast if is_sharded(self.model) else None
            with torch.autocast(self.model.device.type, narrow, enabled=narrow is not None, cache_enabled=False):
                out = self.model.generate(  # type: ignore[operator]
                    prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
                )
            reshard_all(self.model)
        scale = 1.0 if greedy else temperature
        logits = torch.stack(out.logits, 1).float() / scale
        responses = []
        for ids, row in zip(out.sequences[:, prompt.shape[1] :], logits, strict=True):
            ended = (ids == self.template.end_id).nonzero()
            ids = ids[: int(ended[0]) + 1] if len(ended) else ids
            logprobs = row[: len(ids)].log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
            text, finished = self.template.text_of(ids.tolist())
            responses.append(Response(text, tuple(ids.tolist()), finished, tuple(logprobs.tolist())))
        return responses * request.n if greedy else responses

    def update_weights(self, source: WeightSource) -> None:
        own = self.weights()
        # Made whole for whoever asks: their bits, with the rest of the base, are those of the model.
        few = {f"{name}.weight" for name in layers_of_bits(self.model)}
        for name, tensor in source:
            if name in few:
                continue
            if name not in own or local(own[name]).data_ptr() != local(tensor).data_ptr():
                raise RuntimeError(f"the Hugging Face engine samples from the model it was built with, not from {name}")

    def weights(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())


@contextmanager
def _nothing_of_its_own(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model has no settings of generation: generate() would add them to those that it is called with, and
    the samples would be drawn from something else than softmax(logits / T)."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
