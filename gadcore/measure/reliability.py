"""What D's margins are worth: whether they are as sure as they are right, and whether they leave a gradient.

sigma(D(x, y_t) - D(x, y_s))      D's own probability that the first text is the teacher's
sigma(-(D(x, y_t) - D(x, y_s)))   the weight of the pair's gradient in the Bradley-Terry loss
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np

BINS = 10


@dataclass(frozen=True)
class Calibration:
    """error: expected calibration error, the mean distance of sureness and share right over bins of |margin|. nll: the
    BT loss of the pairs; .693 is guessing. temperature: what margins would have to be divided by for the least nll;
    above 1, D is surer than it is right; 0 where it is always right, for which no finite one is best."""

    error: float
    nll: float
    temperature: float


def calibration(margins: Sequence[float]) -> Calibration:
    """Of one margin a pair, at least one."""
    m = np.asarray(margins, dtype=np.float64)
    # Of a pair in either order the surer side is asked: how often is it the teacher's?
    sure, right = 1 / (1 + np.exp(-np.abs(m))), (m > 0) + 0.5 * (m == 0)
    edges = np.quantile(sure, np.linspace(0, 1, BINS + 1)[1:-1])
    bins = np.digitize(sure, edges)
    errors = [abs(sure[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
    nll = float(np.logaddexp(0, -m).mean())
    return Calibration(float(sum(errors)), nll, _temperature(m))


def _temperature(margins: np.ndarray) -> float:
    """By bisection on the slope of the convex nll(1 / temperature)."""

    def slope(scale: float) -> float:
        return float(-(margins / (1 + np.exp(np.clip(scale * margins, -700, 700)))).mean())

    low, high = 1e-4, 1e4
    if slope(low) >= 0:
        return 1 / low
    if slope(high) <= 0:
        return 0.0
    for _ in range(80):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 1 / low


@dataclass(frozen=True)
class Saturation:
    """weight: mean gradient weight of a pair; .5 is D that knows nothing. margin: mean. spread: mean standard deviation
    of the scores inside a group, what GRPO compares; None with one sample a prompt. flat: share of the groups whose
    spread is below a hundredth of the mean |margin|."""

    weight: float
    margin: float
    spread: float | None
    flat: float | None


def saturation(teacher_scores: Sequence[float], scores: Sequence[Sequence[float]]) -> Saturation:
    """Of the scores of every prompt's teacher response and samples."""
    margins = [teacher - score for teacher, group in zip(teacher_scores, scores, strict=True) for score in group]
    spreads = [stdev(group) for group in scores if len(group) > 1]
    size = fmean(map(abs, margins))
    return Saturation(
        fmean(float(1 / (1 + np.exp(np.clip(m, -700, 700)))) for m in margins),
        fmean(margins),
        fmean(spreads) if spreads else None,
        fmean(spread < 0.01 * size for spread in spreads) if spreads else None,
    )
