"""How many rows it takes to see a difference: the power of a paired comparison over prompts.

    n = ((z_.975 + z_.80) sd / mean)^2         rows at which a difference of this size is found in four of five tries
    d = (z_.975 + z_.80) sd / sqrt(n)          the least difference that n rows find so

mean, sd: of the paired differences. Both take the spread that was seen for the true one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

from gadcore.measure.intervals import LEVEL

POWER = 0.8
_WIDTH = NormalDist().inv_cdf((1 + LEVEL) / 2) + NormalDist().inv_cdf(POWER)


def rows_needed(differences: Sequence[float]) -> int | None:
    """None where no number of rows would do: for fewer than two, or a mean of 0."""
    if len(differences) < 2 or abs(fmean(differences)) < 1e-12:
        return None
    return max(2, math.ceil((_WIDTH * stdev(differences) / fmean(differences)) ** 2))


def least_seen(differences: Sequence[float]) -> float | None:
    """None for fewer than two."""
    return _WIDTH * stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
