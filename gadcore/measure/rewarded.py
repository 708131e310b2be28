"""What a discriminator rewards: how its scores of several responses to one prompt go with what is counted of them.

GAD climbs the score among a prompt's samples, so what does not go with it there is nothing that GAD can learn.

    r(x, s)            Pearson's correlation of x and the score s, both less their mean over a prompt's samples, over
                       all samples of all prompts
    r(x, s | words)    the same where words are held: of what is left of x and of s once each is fitted by the words
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gadcore.measure import style
from gadcore.measure.intervals import resampled
from gadcore.measure.likeness import rouge_l, words

LENGTH, HELD = "words", ("style", "rouge_l")


class Association(NamedTuple):
    """A correlation with the score, and its 95 % interval over prompts."""

    correlation: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval shows it, else 0."""
        return (self.low > 0) - (self.high < 0)


def associations(rows: Sequence[Mapping[str, Any]]) -> dict[str, Association]:
    """Of the rows of an evaluation (gadcore.measure.heldout), by measure: "words"; at equal words "style", "rouge_l".

    A measure that says nothing here is absent: one that is the same for all samples of every prompt, or of so few
    prompts that no interval is to be had; all of them where D did not score the samples, or there is one a prompt.
    """
    if len(rows) < 2 or not all(_scored(row) for row in rows):
        return {}
    within = style.word_range([row["teacher"] for row in rows])
    sums = np.stack([_products(row, within) for row in rows])
    found = {LENGTH: _estimate(sums, 0, None)} | {name: _estimate(sums, i, 0) for i, name in enumerate(HELD, 1)}
    return {name: each for name, each in found.items() if each is not None}


def _scored(row: Mapping[str, Any]) -> bool:
    samples = row.get("samples") or ()
    return len(samples) > 1 and all(sample.get("score") is not None for sample in samples)


def _products(row: Mapping[str, Any], within: tuple[float, float]) -> np.ndarray:
    """[4, 4]: sums over the samples of products of words, style, ROUGE-L and score, each less its mean."""
    teacher = row["teacher"]
    values = np.array(
        [
            [
                len(words(s["text"])),
                style.score(style.checks(s["text"], s["finished"], row["prompt"], teacher, within)),
                rouge_l(s["text"], teacher),
                s["score"],
            ]
            for s in row["samples"]
        ],
        dtype=np.float64,
    )
    values -= values.mean(0)
    return values.T @ values


def _estimate(sums: np.ndarray, measure: int, held: int | None) -> Association | None:
    """Of the products of every prompt [prompts, 4, 4]; the score is the last."""

    def correlation(drawn: np.ndarray) -> float:
        whole = total = sums[drawn].sum(0)
        if held is not None and total[held, held] > 0:
            total = total - np.outer(total[:, held], total[held]) / total[held, held]
        # What rounding leaves of what words tell exactly is no spread.
        if any(total[i, i] <= 1e-12 * whole[i, i] for i in (measure, -1)):
            return math.nan
        return float(total[measure, -1] / math.sqrt(total[measure, measure] * total[-1, -1]))

    mean = correlation(np.arange(len(sums)))
    if not math.isfinite(mean):
        return None
    low, high = resampled(correlation, len(sums))
    return Association(mean, low, high) if math.isfinite(low) and math.isfinite(high) else None
