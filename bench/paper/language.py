"""A tiny language with an exactly known teacher, and models for it.

    prompt    n x1 x2 x3              n of 2, 3, 4 segments, letters x
    response  n times: opener x1 x2 x3

The teacher chooses a style (0 with probability .55, else 1) once a response, and every opener is a synonym of that
style: for odd segments style 0 has one synonym and style 1 three, for even ones three and one. So at every opener the
likeliest single word belongs to the other style than at the opener before, and no temperature cures a student that
does not remember the style it began with. The student below does not: it sees the prompt, the last token and its
position. By likelihood it can only mix the styles; to be right it has to keep to one.

In the language "parity" the styles show nowhere: each opener is one of two words, and the number of the second one is
even in every response. Whether a response is right is a parity, which the discriminator has to find first.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from bench.paper.toy import WordTemplate
from gadcore.data.groups import Group
from gadcore.kernels.layout import PrefixLayout

LETTERS = tuple("abcdefgh")
COUNTS = (2, 3, 4)
STYLES = (0.55, 0.45)
# By [segment % 2][style].
SYNONYMS = ((("o0",), ("o1", "o2", "o3")), (("o4", "o5", "o6"), ("o7",)))
GENERIC = ("g0", "g1")
WORDS = (*map(str, COUNTS), *LETTERS, *(f"o{i}" for i in range(8)), *GENERIC)
SEGMENT = 4
LONGEST = 24  # tokens that a sample may have; the teacher's longest response has 17
FLOOR = 1e-3  # of the teacher's distribution of a token, mixed with a uniform one, so that log p is finite


@dataclass(frozen=True)
class Language:
    """name: "styles" or "parity"."""

    name: Literal["styles", "parity"]

    def prompt(self, rng: random.Random, first: Sequence[str]) -> str:
        return " ".join([str(rng.choice(COUNTS)), rng.choice(first), rng.choice(LETTERS), rng.choice(LETTERS)])

    def respond(self, prompt: str, rng: random.Random) -> str:
        """The teacher's response, without its end marker."""
        n, *letters = prompt.split()
        openers = self._openers(int(n), rng)
        return " ".join(word for opener in openers for word in (opener, *letters))

    def _openers(self, n: int, rng: random.Random) -> list[str]:
        if self.name == "styles":
            style = rng.choices((0, 1), STYLES)[0]
            return [rng.choice(SYNONYMS[i % 2][style]) for i in range(n)]
        drawn = [rng.randrange(2) for _ in range(n - 1)]
        return [f"o{bit}" for bit in (*drawn, sum(drawn) % 2)]

    def score(self, prompt: str, text: str, finished: bool) -> tuple[float, bool]:
        """(log p(response | prompt) in nats with the floor, whether the teacher itself could have said it)."""
        n, *letters = prompt.split()
        end = SEGMENT * int(n)
        belief = list(STYLES) if self.name == "styles" else [1.0, 0.0]
        total, valid = 0.0, finished
        words = [*text.split(), "<end>"] if finished else text.split()
        for t, word in enumerate(words):
            segment, place = divmod(t, SEGMENT)
            if t >= end:
                chances = [float(word == "<end>" and t == end)] * 2
            elif place:
                chances = [float(word == letters[place - 1])] * 2
            else:
                chances = self._chances(segment, int(n), word)
            likely = [b * c for b, c in zip(belief, chances, strict=True)]
            p = sum(likely)
            total += math.log((1 - FLOOR) * p + FLOOR / (len(WORDS) + 3))
            valid = valid and p > 0
            if p > 0:
                if self.name == "parity" and place == 0 and t < end and word == "o1":
                    likely.reverse()
                belief = [v / sum(likely) for v in likely]
        return total, valid

    def _chances(self, segment: int, n: int, word: str) -> list[float]:
        """Probability of an opener in either hidden state: the style, or whether the seconds so far are even."""
        if self.name == "styles":
            return [(word in s) / len(s) for s in SYNONYMS[segment % 2]]
        if segment < n - 1:
            return [0.5 * (word in ("o0", "o1"))] * 2
        return [float(word == "o0"), float(word == "o1")]

    def groups(self, template: WordTemplate, count: int, seed: int, *, first: Sequence[str]) -> list[Group]:
        """first: letters that x1 is drawn from."""
        rng = random.Random(seed)
        prompts = [self.prompt(rng, first) for _ in range(count)]
        return [template.group(i, prompt, self.respond(prompt, rng)) for i, prompt in enumerate(prompts)]


def generic(template: WordTemplate, count: int, seed: int) -> list[Group]:
    """What the student knew before: the same tasks over all letters with other openers, a tenth of the letters wrong,
    a segment too many in a fifth of the responses."""
    rng, language = random.Random(seed), Language("styles")
    groups = []
    for i in range(count):
        prompt = language.prompt(rng, LETTERS)
        n, *letters = prompt.split()
        words = []
        for _ in range(int(n) + (rng.random() < 0.2)):
            words += [rng.choice(GENERIC), *(rng.choice(LETTERS) if rng.random() < 0.1 else x for x in letters)]
        groups.append(template.group(i, prompt, " ".join(words)))
    return groups


class _ShortSighted(LlamaModel):
    """Sees the prompt, the token itself, and its position: to the tokens of a response each other one is hidden."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor, position_ids: Tensor, prefix_layout: PrefixLayout, **kwargs: Any) -> Any:
        alone = prefix_layout
        if any(length > 1 for lengths in alone.responses for length in lengths):
            alone = PrefixLayout.of(alone.prompts, [[1] * sum(lengths) for lengths in alone.responses])
        embedded = self.embed_tokens(input_ids) + self.positions(position_ids)
        return super().forward(inputs_embeds=embedded, position_ids=position_ids, prefix_layout=alone, **kwargs)


class ShortSightedPolicy(LlamaForCausalLM):
    """A student too small to remember how it began."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = _ShortSighted(config)
        self.post_init()


def _config(template: WordTemplate, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(template.vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=template.end_id,
        pad_token_id=template.end_id,
        **more,
    )


def policy(template: WordTemplate, seed: int) -> ShortSightedPolicy:
    torch.manual_seed(seed)
    return ShortSightedPolicy(_config(template, tie_word_embeddings=False)).eval()


def scorer(template: WordTemplate, seed: int) -> LlamaForSequenceClassification:
    """A discriminator that reads the whole response."""
    torch.manual_seed(10_000 + seed)
    return LlamaForSequenceClassification(_config(template, num_labels=1)).eval()
