"""PrefixLayout: where prompts and the responses that share them lie in a packed row of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixLayout:
    """G prompts, each followed by its responses, in one row of T tokens without padding. Made by `of`.

    A segment is a prompt or a response. Prompts and responses may differ in length, prompts in the number of their
    responses.

    offsets: [K + 1] int64, segment k owns the tokens offsets[k] .. offsets[k + 1] - 1.
    prompt_of: [K] int64, the segment of k's prompt; k itself where k is a prompt.
    positions: [T] int64, the position of every token in its own sequence: those of a response go on where its prompt
        ends.
    tokens: T. longest: positions of the longest sequence, prompt and response together.
    prompts, responses: the lengths as they were given, known on the host so that nothing waits for a GPU.
    """

    offsets: Tensor
    prompt_of: Tensor
    positions: Tensor
    tokens: int
    longest: int
    prompts: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, prompts: Sequence[int], responses: Sequence[Sequence[int]], device: torch.device | str = "cpu"
    ) -> PrefixLayout:
        """Layout of prompts of prompts[g] tokens with responses of responses[g][i] tokens each.

        Raises ValueError where there is no prompt, where the counts do not fit together, or where a segment is empty.
        """
        if not prompts or len(prompts) != len(responses):
            raise ValueError(f"responses are given for {len(responses)} of {len(prompts)} prompts")
        lengths: list[int] = []
        prompt_of: list[int] = []
        positions: list[Tensor] = []
        longest = 0
        for prompt, group in zip(prompts, responses, strict=True):
            if prompt < 1 or any(length < 1 for length in group):
                raise ValueError(f"prompts and responses have 1 or more tokens, got {prompt} and {list(group)}")
            prompt_of += [len(lengths)] * (1 + len(group))
            lengths += [prompt, *group]
            positions += [torch.arange(prompt), *(torch.arange(prompt, prompt + length) for length in group)]
            longest = max(longest, prompt + max(group, default=0))
        offsets = [0, *accumulate(lengths)]
        return cls(
            torch.tensor(offsets, dtype=torch.int64, device=device),
            torch.tensor(prompt_of, dtype=torch.int64, device=device),
            torch.cat(positions).to(device),
            offsets[-1],
            longest,
            tuple(prompts),
            tuple(map(tuple, responses)),
        )
