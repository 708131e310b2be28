"""Scores at last response tokens, and the Bradley-Terry loss over every (teacher, sample) pair of each group.

    D(x, y) = w . h_last + b
    loss    = sum over pairs of softplus(-(D(x, y_t) - D(x, y_s^i))) / denominator

The teacher is scored once per group and takes part in all of the group's pairs. Everything from h_last on
runs in fp32 (fp64 for fp64 inputs): at |D| of 8 to 16 a step of bf16 is 1/16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gadcore.kernels.layout import GroupLayout


class BTScore(NamedTuple):
    """scores: [S]. loss: scalar. margin, accuracy: [P] per pair, without gradient, pairs in sequence order."""

    scores: Tensor
    loss: Tensor
    margin: Tensor
    accuracy: Tensor


def bt_score(
    hidden: Tensor,
    last_index: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: GroupLayout,
    *,
    denominator: float,
) -> BTScore:
    """Scores S sequences and forms the BT loss over their groups.

    hidden: [T, H], any float dtype; last_index: [S] int64 rows of hidden; weight: [H]; bias: scalar or None.
    denominator: pairs in the whole batch. Groups without a teacher are scored and form no pairs.
    A tie counts as half a correct pair in `accuracy`.
    """
    last = hidden[last_index]
    last = last.to(torch.promote_types(last.dtype, torch.float32))
    # A row-wise product and sum instead of a matrix product: every score is then computed by the same
    # instructions whatever its position, and identical text scores identically to the bit.
    scores = (last * weight.to(last.dtype)).sum(-1)
    if bias is not None:
        scores = scores + bias.to(last.dtype)
    paired = ~groups.is_teacher & groups.has_teacher[groups.group_of]
    teacher_of = groups.offsets[:-1][groups.group_of[paired]]
    margin = scores[teacher_of] - scores[paired]
    loss = F.softplus(-margin).sum() / denominator
    detached = margin.detach()
    return BTScore(scores, loss, detached, (detached > 0).to(detached.dtype) + 0.5 * (detached == 0).to(detached.dtype))
