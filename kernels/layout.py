"""GroupLayout: which sequences belong to which group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GroupLayout:
    """Groups over a flat list of S sequences, in compressed-row style.

    Sequences of a group are neighbours; a group's teacher, where it has one, comes first.

    offsets: [G + 1] int64, group g owns the sequences offsets[g] .. offsets[g + 1] - 1.
    has_teacher: [G] bool.
    """

    offsets: Tensor
    has_teacher: Tensor

    @classmethod
    def of(cls, samples: Sequence[int], teacher: bool, device: torch.device | str = "cpu") -> GroupLayout:
        """Layout of groups with samples[g] samples each, all with a teacher or all without one."""
        sizes = torch.tensor([n + teacher for n in samples], dtype=torch.int64)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        return cls(offsets.to(device), torch.full((len(samples),), teacher, device=device))

    @property
    def group_of(self) -> Tensor:
        """[S] int64, the group of every sequence."""
        sizes = self.offsets.diff()
        return torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)

    @property
    def is_teacher(self) -> Tensor:
        """[S] bool, True where the sequence is its group's teacher."""
        mask = torch.zeros(int(self.offsets[-1]), dtype=torch.bool, device=self.offsets.device)
        mask[self.offsets[:-1][self.has_teacher]] = True
        return mask
