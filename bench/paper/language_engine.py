"""The tiny language's sampler: a pass over every word at a few positions at once, in a few plain operations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from bench.paper.language import ShortSightedPolicy
from bench.paper.toy import ToyEngine
from gadcore.data.template import ChatTemplate
from gadcore.rollout.engine import SampleRequest

# Positions of a response whose states are computed together, where the prompts are few.
AHEAD = 8
# Prompts and samples of them from which on that is less work than every sample's own token.
FEW = 64


class LanguageEngine(ToyEngine):
    """A ToyEngine for ShortSightedPolicy, several times as fast: most of a toy's time went into calling its model.

    A token sees the prompt and itself, so that the keys and values of the prompts are all that has to be kept.
    """

    def __init__(self, model: PreTrainedModel, template: ChatTemplate) -> None:
        super().__init__(model, template)
        # By layer, keys and values [G, heads, P, d] of the prompts.
        self._prompts: list[tuple[Tensor, Tensor]] = []
        # [G, AHEAD, V, H]: states of every word at AHEAD positions from the last multiple of it.
        self._words: Tensor | None = None

    def _begin(self, requests: Sequence[SampleRequest]) -> Tensor:
        """Hidden states [G, H] at the prompts' ends; all prompts have one length."""
        self._prompts = []
        ids = torch.tensor([request.prompt_ids for request in requests])
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return self._pass(ids, positions, prompt=True)[:, -1]

    def _next(self, requests: Sequence[SampleRequest], of_sample: Tensor, token: Tensor, t: int) -> Tensor:
        prompt, groups = len(requests[0].prompt_ids), len(requests)
        if groups > FEW or len(token) == groups:
            # One row a group: samples of a group stand behind each other, equally many.
            ids = token.view(groups, -1)
            return self._pass(ids, torch.full_like(ids, prompt + t)).flatten(0, 1)
        if t % AHEAD == 0:
            words = self.model.config.vocab_size
            ids = torch.arange(words).repeat(AHEAD).expand(groups, -1)
            places = prompt + t + torch.arange(AHEAD).repeat_interleave(words)
            self._words = self._pass(ids, places.expand(groups, -1)).view(groups, AHEAD, words, -1)
        return cast(Tensor, self._words)[of_sample, t % AHEAD, token]

    def _pass(self, ids: Tensor, positions: Tensor, *, prompt: bool = False) -> Tensor:
        """Hidden states [G, R, H] of tokens [G, R] at positions [G, R] behind the prompts, or of the prompts."""
        model = cast(ShortSightedPolicy, self.model).model
        # Beyond the last position there is nothing to sample.
        positions = positions.clamp(max=model.config.max_position_embeddings - 1)
        hidden = model.embed_tokens(ids) + model.positions(positions)
        cos, sin = (x[:, None] for x in model.rotary_emb(hidden, positions))
        for number, layer in enumerate(model.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(hidden)
            query, key, value = (
                F.linear(normed, cast(nn.Linear, product).weight)
                .unflatten(-1, (-1, attention.head_dim))
                .transpose(1, 2)
                for product in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            query, key = (x * cos + _rotated(x) * sin for x in (query, key))
            if prompt:
                self._prompts.append((key, value))
                mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            else:
                mixed = _with_prompt(query, key, value, *self._prompts[number])
            hidden = hidden + F.linear(mixed.transpose(1, 2).flatten(2), attention.o_proj.weight)
            normed, mlp = layer.post_attention_layernorm(hidden), layer.mlp
            gated = F.silu(F.linear(normed, mlp.gate_proj.weight)) * F.linear(normed, mlp.up_proj.weight)
            hidden = hidden + F.linear(gated, mlp.down_proj.weight)
        return model.norm(hidden)


def _rotated(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _with_prompt(query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor) -> Tensor:
    """Attention of every token to the prompt and to itself alone; [G, heads, R, d]."""
    scale = query.shape[-1] ** -0.5
    own = (query * key).sum(-1, keepdim=True)
    weights = (torch.cat([query @ prompt_key.transpose(-1, -2), own], -1) * scale).softmax(-1)
    return weights[..., :-1] @ prompt_value + weights[..., -1:] * value
