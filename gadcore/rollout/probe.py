"""The proof that the sampler samples from the trainer's weights: some of its tokens, scored by the trainer.

A fingerprint says that bytes arrived. The probe asks for what they are there for: the engine's log-probs of tokens that
it has drawn are the trainer's, under the weights that were synchronised, up to what rounding explains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gadcore.data.groups import Group, Prompt, Response
from gadcore.distributed.fsdp import reshard_all
from gadcore.errors import UserError
from gadcore.rollout.engine import SampleRequest

# How far log-probs of samples may lie from the trainer's, in the mean, by the engine's dtype: rounding, and no more.
BOUNDS = {"float32": 0.01, "bfloat16": 0.2}
# Of every family's config.json.
_OF_ALL = {"model_type", "output_attentions", "transformers_version"}
# Per group and sample the log-probs [tokens] of its tokens by the trainer, at the sampler's temperature.
Score = Callable[[Sequence[Group]], Sequence[Sequence[Tensor]]]
# Of a probe: sequences, the shortest prompts' first, and tokens of each.
_SEQUENCES, _TOKENS = 4, 64


class Probe:
    """Compares log-probs of a few sampled tokens, after the first sync and every `every`-th one from there on."""

    def __init__(self, score: Score, *, every: int, dtype: str) -> None:
        """every: 0 for never. dtype: "float32" or "bfloat16", of the engine."""
        self._score, self._every, self._dtype = score, every, dtype
        self._syncs = 0

    def due(self) -> bool:
        """Counts a sync; whether its samples are to be looked at."""
        self._syncs += 1
        return self._every > 0 and (self._syncs - 1) % self._every == 0

    def check(self, requests: Sequence[SampleRequest], responses: Sequence[Sequence[Response]]) -> None:
        """Raises UserError, with both figures, where the trainer gives the samples other log-probs than the sampler.

        On several ranks all look at the same samples.
        """
        shortest = _shortest(requests)
        groups = [
            Group(Prompt(-1, (), requests[i].prompt_ids), Response("", (), True), [_beginning(responses[i][0])])
            for i in shortest
            if responses[i][0].token_ids
        ]
        if not groups:
            return
        with torch.no_grad():
            scored = [row for group in self._score(groups) for row in group]
        trainer = torch.cat([row.detach().double().cpu() for row in scored])
        sampler = torch.tensor([p for group in groups for p in group.samples[0].logprobs], dtype=torch.float64)
        difference, bound = (trainer - sampler).abs().mean().item(), BOUNDS[self._dtype]
        # Not "above": a NaN is no agreement.
        if not difference < bound:
            raise UserError(
                f"the probe of sync {self._syncs}: {len(sampler)} sampled tokens have a mean log-prob of "
                f"{sampler.mean():.4f} by the sampler and of {trainer.mean():.4f} by the trainer under the weights "
                f"that were synchronised; they differ by {difference:.2g} in the mean, and {self._dtype} explains "
                f"{bound}: the sampler does not sample from the trainer's weights, and no step since the probe before "
                "can be trusted"
            )


def few(requests: Sequence[SampleRequest]) -> list[SampleRequest]:
    """One sample of each of those that check() would look at."""
    return [replace(requests[i], n=1) for i in _shortest(requests)]


def _shortest(requests: Sequence[SampleRequest]) -> list[int]:
    """Places of those with the shortest prompts."""
    return sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i))[:_SEQUENCES]


def _beginning(response: Response) -> Response:
    tokens = response.token_ids[:_TOKENS]
    return replace(response, token_ids=tokens, logprobs=response.logprobs[:_TOKENS])


def check_distribution(
    model: PreTrainedModel, model_path: str, dtype: str, prompt: Sequence[int], sample: Response
) -> None:
    """Raises UserError where the log-probs of a sample at temperature 1 are not the trainer's, equal weights or not."""
    ids = torch.tensor([[*prompt, *sample.token_ids]], device=model.device)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    reshard_all(model)
    found = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
    difference = (found - torch.tensor(sample.logprobs, device=found.device)).abs().mean().item()
    if not difference < BOUNDS[dtype]:
        unknown = ", ".join(_unknown(model.config))
        mend = f"take {unknown} out of its config.json, which only vLLM obeys, or " if unknown else ""
        raise UserError(
            f"vLLM does not compute what the trainer does for the model {model_path} ({model.config.model_type}): "
            f'log-probs of a sample differ by {difference:.2g} in the mean; {mend}set rollout.engine = "hf"'
        )


def _unknown(config: PreTrainedConfig) -> list[str]:
    """Settings that the model's own family does not have; vLLM asks for some by name whatever the family is."""
    known = {field.name for field in fields(config)} | config.attribute_map.keys() | _OF_ALL
    return sorted(name for name in config.to_dict().keys() - known if not name.startswith("_"))


def sample_for_check(model: PreTrainedModel, context_tokens: int) -> tuple[tuple[int, ...], int]:
    """(a prompt of any tokens, how many are to be sampled) to check a distribution with."""
    tokens = max(1, min(8, context_tokens // 2))
    vocabulary = model.config.get_text_config().vocab_size
    return tuple(1 + 7 * i % (vocabulary - 1) for i in range(tokens)), tokens
