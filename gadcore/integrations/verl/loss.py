"""The Bradley-Terry loss for a value model of which every rank sees any part of the pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

# The field of a row that holds its coefficient, at its last response token.
WEIGHT = "bt_weight"


@dataclass(frozen=True)
class Pairs:
    """coefficients: [rows], the derivative of the BT loss with respect to every row's score, 0 of rows in no pair.
    loss, accuracy, margin: means over all pairs."""

    coefficients: Tensor
    loss: float
    accuracy: float
    margin: float


def pairs_of(scores: Tensor, groups: Sequence[tuple[int, Sequence[int]]]) -> Pairs:
    """The mean over all pairs of softplus(-(D(x, y_t) - D(x, y_s))), and what a score of a row does to it.

    scores: [rows]. groups: (row of the teacher's response, rows of the samples) of every prompt.
    """
    scores = scores.detach().double()
    teacher = torch.tensor([t for t, samples in groups for _ in samples])
    sample = torch.tensor([s for _, samples in groups for s in samples])
    margin = scores[teacher] - scores[sample]
    slope = torch.sigmoid(-margin) / len(margin)
    coefficients = torch.zeros_like(scores).index_add(0, sample, slope).index_add(0, teacher, -slope)
    right = (margin > 0).double() + 0.5 * (margin == 0).double()
    return Pairs(coefficients.float(), float(softplus(-margin).mean()), float(right.mean()), float(margin.mean()))


def bt_loss(model_output: Any, data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
    """A loss function for verl's value model, whose gradients add up to that of the BT loss over the whole batch,
    whatever rows the micro-batches and ranks have.

    model_output: {"values": nested [rows, tokens]}. data: nested fields of the rows, `bt_weight` [rows, response] from
    pairs_of() among them; dp_size. That holds for one optimizer step, from the weights that gave the scores.
    """
    weights = data[WEIGHT]
    ends = weights.offsets()[1:] - 1
    scores = last_values(model_output["values"])
    # The engine averages gradients over ranks.
    loss = (weights.values()[ends].to(scores) * scores).sum() * int(data["dp_size"])
    return loss, {}


def last_values(values: Any) -> Tensor:
    """[rows], of every row of a nested [rows, tokens] the value at its last token."""
    last: Tensor = values.values()[values.offsets()[1:] - 1]
    return last.float()
