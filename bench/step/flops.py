"""FLOPs of the matrix products that a GAD step cannot do without, by phase: the packed layout, attention included.

Counted is what the mathematics asks for, once: a backward pass is two products for each of the forward pass, whatever
an implementation computes again; sampling is one forward pass over every token, its prompt shared. Rates from these
counts are never above what the processor does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Widths:
    """What a decoder's products depend on."""

    hidden: int
    layers: int
    query: int
    key: int
    mlp: int
    vocabulary: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Widths:
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads * head,
            config.num_key_value_heads * head,
            config.intermediate_size,
            config.vocab_size,
        )

    @property
    def _query_side(self) -> int:
        """FLOPs a token of query, output and MLP projections (gate, up, down) of a layer."""
        return 2 * (2 * self.hidden * self.query + 3 * self.hidden * self.mlp)

    @property
    def _key_side(self) -> int:
        return 2 * 2 * self.hidden * self.key

    def layer(self, queries: int, keys: int, pairs: int) -> int:
        """One layer: `queries` tokens ask, `keys` tokens are there to be seen, `pairs` (query, key) pairs."""
        return queries * self._query_side + keys * self._key_side + 2 * 2 * pairs * self.query

    def head(self, tokens: int) -> int:
        return 2 * tokens * self.hidden * self.vocabulary


@dataclass(frozen=True)
class Lengths:
    """Tokens of a group: its prompt, its responses."""

    prompt: int
    responses: tuple[int, ...]


def triangle(n: int) -> int:
    return n * (n + 1) // 2


def _packed(group: Lengths) -> tuple[int, int]:
    """Tokens and causal (query, key) pairs of the group, its prompt once."""
    tokens = group.prompt + sum(group.responses)
    pairs = triangle(group.prompt) + sum(n * group.prompt + triangle(n) for n in group.responses)
    return tokens, pairs


def forward(widths: Widths, groups: Sequence[Lengths]) -> int:
    """Log-probs of all response tokens. From the last token of a response nothing is predicted."""
    total = 0
    for group in groups:
        tokens, pairs = _packed(Lengths(group.prompt, tuple(n - 1 for n in group.responses)))
        total += widths.layers * widths.layer(tokens, tokens, pairs) + widths.head(sum(group.responses))
    return total


def scores(widths: Widths, groups: Sequence[Lengths]) -> int:
    """Scores at the last tokens: in the last layer only they ask. The scalar head is left out."""
    total = 0
    for group in groups:
        tokens, pairs = _packed(group)
        last = len(group.responses)
        seen = sum(group.prompt + n for n in group.responses)
        total += (widths.layers - 1) * widths.layer(tokens, tokens, pairs) + widths.layer(last, tokens, seen)
    return total


def step(student: Sequence[Lengths], discriminator: Sequence[Lengths], g: Widths, d: Widths) -> dict[str, int]:
    """By phase. student: prompts and samples; discriminator: prompts, teacher's responses and samples."""
    once = forward(g, student)
    return {
        "generate": once,
        "reference": once,
        "policy": 3 * once,
        "discriminator": 3 * scores(d, discriminator),
    }
