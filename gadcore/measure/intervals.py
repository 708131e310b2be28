"""How sure a mean is: 95 % intervals by the bootstrap over prompts, and for shares by Wilson's formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, stdev
from typing import Any

import numpy as np

LEVEL = 0.95
_Z = 1.959964  # the normal distribution's quantile at (1 + LEVEL) / 2


@dataclass(frozen=True)
class Estimate:
    """A mean over n rows with the interval (low, high) that holds the mean of all such rows at 95 % confidence."""

    mean: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "interval": [self.low, self.high], "n": self.n}


def bootstrap(values: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> Estimate:
    """The mean of values (one per row, at least one) and its percentile bootstrap interval.

    Rows are drawn n out of n with replacement, `resamples` times; the interval runs from the 2.5th to the 97.5th
    percentile of the means. It reflects the choice of rows alone: neither another draw of responses from the same
    model nor another training run is in it. One row has no interval to speak of: low = high = mean.

    Raises ValueError where there are no values, or where one is not finite.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not data.size or not np.isfinite(data).all():
        raise ValueError(f"values must be a list of at least one finite number, found {values!r:.80}")
    low, high = resampled(lambda rows: data[rows].mean(), data.size, seed=seed, resamples=resamples)
    return Estimate(float(data.mean()), low, high, data.size)


def resampled(
    statistic: Callable[[np.ndarray], float], n: int, *, seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """The percentile bootstrap interval of any statistic of n rows; it gets int64 [n], the rows drawn."""
    generator = np.random.default_rng(seed)
    # One resample at a time: [resamples, n] at once would be large for large sets.
    drawn = [statistic(generator.integers(n, size=n)) for _ in range(resamples)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def difference(first: Sequence[float], second: Sequence[float], *, seed: int = 0, resamples: int = 2000) -> Estimate:
    """The mean of second - first, row by row, and its interval: both hold a value for each of the same rows."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values do not form pairs")
    return bootstrap(np.subtract(second, first).tolist(), seed=seed, resamples=resamples)


def margin(differences: Sequence[float], comparisons: int = 1) -> float | None:
    """Half the width of the t interval around the mean of paired differences; None for fewer than two.

    For a difference that has to be told from noise where rows may be few: at 4 rows it is 1.6 times as wide as the
    normal distribution would have it. comparisons: made at once, all of whose intervals hold together (Bonferroni).
    """
    n = len(differences)
    return _t(n - 1, comparisons) * stdev(differences) / math.sqrt(n) if n > 1 else None


def _t(freedom: int, comparisons: int = 1) -> float:
    """The quantile of Student's t at (1 + LEVEL) / 2, for whole degrees of freedom; of several comparisons nearer 1."""
    tail = (1 - LEVEL) / 2 / comparisons
    if freedom == 1:
        return 1 / math.tan(math.pi * tail)
    if freedom == 2:
        return (1 - 2 * tail) / math.sqrt(2 * tail * (1 - tail))
    # Fisher's expansion around the normal quantile, right to three digits from 3 degrees of freedom on.
    z, v = _Z if comparisons == 1 else NormalDist().inv_cdf(1 - tail), freedom
    terms = (
        (z**3 + z) / (4 * v),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3),
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4),
    )
    return z + sum(terms)


def wilson(share: float, n: int) -> Estimate:
    """A share of n independent trials with Wilson's score interval, which holds at shares of 0 and 1 too.

        (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),   z = 1.96

    Raises ValueError for a share outside [0, 1] or n < 1.
    """
    if not 0 <= share <= 1 or n < 1:
        raise ValueError(f"a share of {share} in {n} trials is impossible")
    centre = share + _Z**2 / (2 * n)
    spread = _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    return Estimate(share, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale), n)
