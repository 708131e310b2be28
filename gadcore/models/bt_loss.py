"""What is added to the Bradley-Terry loss where a run asks for it: sums over pairs, whatever the cut of a batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gadcore.kernels.layout import GroupLayout


def softened_bt_loss(scores: Tensor, groups: GroupLayout, smoothing: float, cap: float | None) -> Tensor:
    """The BT loss with opt-in remedies against a discriminator that wins too clearly, summed over pairs.

        m    = min(D(x, y_t) - D(x, y_s^i), cap)
        loss = (1 - e) softplus(-m) + e softplus(m) = softplus(-m) + e m

    With smoothing e > 0 the loss of a pair is least at the margin log((1 - e) / e), not at infinity. A pair whose
    margin is above the cap gives no gradient. scores: [S], floating, every group's teacher first; groups without one
    form no pairs.
    """
    margin = scores[groups.group_offsets[groups.group_of]] - scores
    if cap is not None:
        margin = margin.clamp(max=cap)
    return (F.softplus(-margin) + smoothing * margin).where(groups.paired, 0.0).sum()


def score_penalty(scores: Tensor, groups: GroupLayout) -> Tensor:
    """Sum over pairs of D(x, y_t)^2 + D(x, y_s)^2: over pairs, so that it adds up however a group is cut.

    scores: [S], floating, every group's teacher first; groups without one form no pairs.
    """
    squares = scores.square()
    return (squares[groups.group_offsets[groups.group_of]] + squares).where(groups.paired, 0.0).sum()
