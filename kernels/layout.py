"""GroupLayout: which sequences belong to which group, and which tokens to which sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupLayout:
    """G groups over a flat list of S sequences over a flat list of T tokens, in compressed-row style.

    A group is one prompt's responses: its teacher's, where it has one, comes first, then its samples. Groups may
    differ in size, have no teacher, or be empty; sequences may differ in length. Made by `of`.

    group_offsets: [G + 1] int64, group g owns the sequences group_offsets[g] .. group_offsets[g + 1] - 1.
    has_teacher: [G] bool.
    sequences: S, known on the host so that nothing has to wait for a GPU to learn it.
    token_offsets: [S + 1] int64, sequence s owns the tokens token_offsets[s] .. token_offsets[s + 1] - 1; None where
        only whole sequences are computed on.
    tokens: T, or None.
    """

    group_offsets: Tensor
    has_teacher: Tensor
    sequences: int
    token_offsets: Tensor | None = None
    tokens: int | None = None

    @classmethod
    def of(
        cls,
        samples: Sequence[int],
        teacher: bool | Sequence[bool],
        lengths: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> GroupLayout:
        """Layout of groups with samples[g] samples each, beside the teacher of those that have one.

        teacher: for all groups alike, or per group. lengths: tokens of every sequence, teachers included, in order.
        Raises ValueError where counts do not fit together.
        """
        teachers = [teacher] * len(samples) if isinstance(teacher, bool) else list(teacher)
        if len(teachers) != len(samples):
            raise ValueError(f"samples are given for {len(samples)} groups, teacher for {len(teachers)}")
        if any(n < 0 for n in samples):
            raise ValueError(f"samples must be 0 or more in every group, are {list(samples)}")
        group_offsets = [0, *accumulate(n + t for n, t in zip(samples, teachers, strict=True))]
        sequences = group_offsets[-1]
        token_offsets = None
        if lengths is not None:
            if len(lengths) != sequences or any(n < 0 for n in lengths):
                raise ValueError(f"lengths must hold 0 or more for each of {sequences} sequences, are {list(lengths)}")
            token_offsets = [0, *accumulate(lengths)]
        return cls(
            torch.tensor(group_offsets, dtype=torch.int64, device=device),
            torch.tensor(teachers, dtype=torch.bool, device=device),
            sequences,
            None if token_offsets is None else torch.tensor(token_offsets, dtype=torch.int64, device=device),
            None if token_offsets is None else token_offsets[-1],
        )

    @property
    def group_of(self) -> Tensor:
        """[S] int64, the group of every sequence."""
        return _owners(self.group_offsets, self.sequences)

    @property
    def sequence_of(self) -> Tensor:
        """[T] int64, the sequence of every token; needs token_offsets."""
        if self.token_offsets is None or self.tokens is None:
            raise ValueError("this layout knows no tokens: make it with GroupLayout.of(.., lengths=..)")
        return _owners(self.token_offsets, self.tokens)

    @property
    def is_teacher(self) -> Tensor:
        """[S] bool, True where the sequence is its group's teacher."""
        index = torch.arange(self.sequences, device=self.group_offsets.device)
        group = self.group_of
        return self.has_teacher[group] & (self.group_offsets[group] == index)

    @property
    def paired(self) -> Tensor:
        """[S] bool, True where the sequence is a sample whose group has a teacher."""
        return ~self.is_teacher & self.has_teacher[self.group_of]


def _owners(offsets: Tensor, items: int) -> Tensor:
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=items)
