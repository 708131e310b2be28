"""SODA: the student's pass of Direct Preference Optimisation, the teacher's response against its own earlier ones.

    h(y) = log pi(y | x) - log pi_ref(y | x)                    summed over the tokens of y, the end marker included
    loss = mean over pairs of softplus(-beta (h(y_t) - h(y_s^i)))                       (DPO, arXiv 2305.18290)

y_s^1..y_s^N are samples of one frozen snapshot of the student (arXiv 2604.03873), and pi_ref is that student, so that
its log-probs are known once for all. Log-probs are those of temperature 1. Prompt and teacher's response are computed
once for the N pairs of a group; of a group that is cut over micro-batches, every part has them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gadcore.data.groups import Group, GroupTokens, MicroBatch
from gadcore.kernels.layout import GroupLayout
from gadcore.models.readout import Readout, together
from gadcore.models.student import Student


class PreferenceStats(Readout):
    """What a DPO pass found, means over all pairs of the batch.

    loss. accuracy: pairs in which the teacher's response has the larger h, a tie counting one half. margin:
    beta (h(y_t) - h(y_s)). teacher, student: beta h of either side.
    """

    loss: float
    accuracy: float
    margin: float
    teacher: float
    student: float


class DPOLoss(NamedTuple):
    """loss: scalar, summed over pairs. h: [S], beta h of every sequence. margin: [S], 0 where not paired.

    Only loss has a gradient.
    """

    loss: Tensor
    h: Tensor
    margin: Tensor


def dpo_loss(logprob: Tensor, reference: Tensor, layout: GroupLayout, beta: float) -> DPOLoss:
    """The loss of S sequences, every group's teacher first; groups without one form no pairs.

    logprob, reference: [S] floating, log-probs of whole sequences.
    """
    h = beta * (logprob - reference)
    margin = (h[layout.group_offsets[layout.group_of]] - h).where(layout.paired, 0.0)
    loss = F.softplus(-margin).where(layout.paired, 0.0).sum()
    return DPOLoss(loss, h.detach(), margin.detach())


def sequence_sums(values: Tensor, layout: GroupLayout) -> Tensor:
    """[S] float64, of every sequence the sum of its tokens' values [T]: a response of 1,500 tokens has a log-prob of
    thousands, of which float32 has three decimals."""
    sums = torch.zeros(layout.sequences, dtype=torch.float64, device=values.device)
    return sums.index_add(0, layout.sequence_of, values.double())


@torch.no_grad()
def sequence_logprobs(student: Student, groups: Sequence[Group]) -> list[list[float]]:
    """log pi(y | x) of the student as it is: per group the teacher's response first, then its samples."""
    tokens = _tokens(groups)
    count = sum(len(group.responses) for group in tokens)
    found = torch.full((count,), -torch.inf, dtype=torch.float64, device=student.model.device)
    for micro in student.packed(tokens, teacher=True, scored=False):
        sums = _sums(student, micro)
        if not micro.idle:
            # A teacher that several parts of a group have gets the same value from each, but for rounding.
            found[micro.index] = sums
    # Of several processes each has found its own.
    values = iter(student.world.max_(found).tolist())
    return [[next(values) for _ in group.responses] for group in tokens]


def preference_backward(
    student: Student, groups: Sequence[Group], reference: Sequence[Sequence[float]], beta: float
) -> PreferenceStats:
    """Adds the gradient of the DPO loss on the batch. reference: as sequence_logprobs() gave it for these groups.

    Raises ValueError where reference is of other groups.
    """
    tokens = _tokens(groups)
    if [len(row) for row in reference] != [len(group.responses) for group in tokens]:
        raise ValueError("reference must hold a log-prob for the teacher and for every sample of each group")
    device = student.model.device
    known = torch.tensor([value for row in reference for value in row], dtype=torch.float64, device=device)
    pairs = sum(len(group.samples) for group in groups)
    zero = torch.zeros((), dtype=torch.float64, device=device)
    figures = dict.fromkeys(("loss", "accuracy", "margin", "teacher", "student"), zero)
    for micro in student.packed(tokens, teacher=True, scored=False):
        if micro.idle:
            student.take_part(micro)
            continue
        layout = micro.sequences
        made = dpo_loss(_sums(student, micro), known[micro.index], layout, beta)
        loss = made.loss / pairs
        loss.backward()
        paired, margin = layout.paired, made.margin
        found = {
            "loss": loss.detach(),
            "accuracy": ((margin > 0).double() + 0.5 * (margin == 0).double()).where(paired, 0.0).sum() / pairs,
            "margin": margin.sum() / pairs,
            "student": made.h.where(paired, 0.0).sum() / pairs,
        }
        found["teacher"] = found["margin"] + found["student"]
        figures = {name: value + found[name] for name, value in figures.items()}
    figures, _ = together(student.world, figures, {})
    return student.later(PreferenceStats(figures, tokens=sum(group.tokens for group in tokens)))


def _sums(student: Student, micro: MicroBatch) -> Tensor:
    return sequence_sums(student.logprobs(student.model, micro.tokens, 1.0), micro.sequences)


def _tokens(groups: Sequence[Group]) -> list[GroupTokens]:
    """[x | y_t | y_s^1 | ..] of every group, the samples in the tokens in which they were drawn."""
    return [
        GroupTokens(group.prompt.token_ids, (group.teacher.token_ids, *(s.token_ids for s in group.samples)))
        for group in groups
    ]
