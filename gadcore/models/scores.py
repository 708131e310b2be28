"""What a pass of the discriminator found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from gadcore.kernels.layout import GroupLayout
from gadcore.models.readout import Readout


class Scores(Readout):
    """What one discriminator pass over a batch found, under the weights that it had then.

    loss: the BT loss. accuracy, margin: means over all pairs. tokens: tokens that went through the model.
    cut, empty: samples that were cut for D, and that had no text. grad_norm: before clipping, of update() alone.
    """

    loss: float
    accuracy: float
    margin: float
    cut: int = 0
    empty: int = 0
    grad_norm: float | None = None

    def __init__(self, scores: Tensor, sizes: Sequence[int], figures: Mapping[str, Tensor], tokens: int) -> None:
        """scores: [S] of all responses, every group's teacher first. sizes: samples of every group."""
        super().__init__(figures, scores, tokens=tokens)
        self.sizes = list(sizes)
        begin = [0, *accumulate(size + 1 for size in sizes)]
        self._begin = begin
        samples = [i for start, size in zip(begin, sizes, strict=False) for i in range(start + 1, start + 1 + size)]
        # The rewards stay where they were made: a student on the same device waits for no host.
        self._rewards = scores[torch.tensor(samples, dtype=torch.int64, device=scores.device)]

    @property
    def sample_scores(self) -> Tensor:
        """D(x, y_s^i) [R] of all samples, group after group, on D's device: the rewards, ready for GRPO."""
        return self._rewards

    @property
    def rewards(self) -> list[list[float]]:
        """Per group, D(x, y_s^i) of its samples."""
        values = self.vector()
        return [values[start + 1 : start + 1 + size] for start, size in zip(self._begin, self.sizes, strict=False)]

    @property
    def teacher_scores(self) -> list[float]:
        """Per group, D(x, y_t)."""
        values = self.vector()
        return [values[start] for start in self._begin[:-1]]

    @classmethod
    def of(cls, rewards: Sequence[Sequence[float]], teacher_scores: Sequence[float], tokens: int = 0) -> Scores:
        """Scores that were made elsewhere, with the BT loss, accuracy and margin that follow from them."""
        rows = zip(teacher_scores, rewards, strict=True)
        scores = torch.tensor([s for teacher, group in rows for s in (teacher, *group)], dtype=torch.float64)
        sizes = [len(group) for group in rewards]
        layout = GroupLayout.of(sizes, teacher=True)
        margin = (scores[layout.group_offsets[layout.group_of]] - scores)[layout.paired]
        figures = {
            "loss": F.softplus(-margin).mean(),
            "accuracy": ((margin > 0).double() + 0.5 * (margin == 0).double()).mean(),
            "margin": margin.mean(),
        }
        return cls(scores, sizes, figures, tokens)
