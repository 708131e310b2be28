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
    """Log-probs of all response tokens. From the last token of a response nothing is predicted, from those of the
    prompt only by the last: in the last layer the others do not ask.
    """
    total = 0
    for group in groups:
        tokens, pairs = _packed(Lengths(group.prompt, tuple(n - 1 for n in group.responses)))
        before = group.prompt - 1
        last = widths.layer(tokens - before, tokens, pairs - triangle(before))
        total += (widths.layers - 1) * widths.layer(tokens, tokens, pairs) + last + widths.head(sum(group.responses))
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


# -- the opponents' schedules, for the ratio that FLOPs alone give -----------------------------------------------------


def packed(widths: Widths, prompt: int, response: int, samples: int) -> int:
    """A group's packed step with both models of these widths, every response of full length."""
    student = Lengths(prompt, (response,) * samples)
    scored = Lengths(prompt, (response,) * (samples + 1))
    return sum(step([student], [scored], widths, widths).values())


def padded(widths: Widths, rows: int, tokens: int, *, logits: int) -> int:
    """A forward pass over `rows` rows, each of `tokens` tokens of which `logits` go through the head."""
    return rows * (widths.layers * widths.layer(tokens, tokens, triangle(tokens)) + widths.head(logits))


def trl(widths: Widths, prompt: int, response: int, samples: int) -> int:
    """A group's step as TRL's trainer takes it with both models of these widths, every sample of full length."""
    tokens = prompt + response
    policy = padded(widths, samples, tokens, logits=response)
    # generate() with a cache: every token once; the reference; the policy, forward and backward; then D's two passes.
    score = padded(widths, samples, tokens, logits=0)
    return policy * (1 + 1 + 3) + score + 3 * padded(widths, samples + 1, tokens, logits=0)


def literal(widths: Widths, prompt: int, response: int, samples: int, *, recompute: bool = False) -> int:
    """The same by the paper's schedule; its sampler shares prompts as ours does.

    recompute: with the forward passes that the paper's code repeats in backward, its activation checkpointing.
    """
    tokens, passes = prompt + response, 4 if recompute else 3
    whole = padded(widths, samples, tokens, logits=tokens)
    score = padded(widths, samples, tokens, logits=0)
    # Old log-probs, the reference, the policy; D's rewards; D on the samples and as many times the teacher's response.
    trained = whole * (1 + 1 + passes) + score + passes * 2 * score
    return forward(widths, [Lengths(prompt, (response,) * samples)]) + trained
