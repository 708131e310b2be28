from __future__ import annotations

import math

import numpy as np
import pytest

from gadcore.measure.intervals import Estimate, bootstrap, difference, wilson


def test_the_bootstrap_holds_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(1)
    held = 0
    for trial in range(300):
        found = bootstrap(generator.exponential(2.0, size=60).tolist(), seed=trial, resamples=400)
        held += found.low <= 2.0 <= found.high
    # A skewed distribution costs the percentile method some coverage; 3 standard errors of 300 trials are 4 %.
    assert 0.88 <= held / 300 <= 0.985


def test_the_bootstrap_agrees_with_the_normal_interval_where_that_is_right() -> None:
    values = np.random.default_rng(2).normal(5, 3, size=1000)
    found = bootstrap(values.tolist(), resamples=4000)
    half = 1.96 * values.std(ddof=1) / math.sqrt(1000)
    assert found.mean == pytest.approx(values.mean()) and found.n == 1000
    assert found.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_the_bootstrap_repeats_itself_and_obeys_its_seed() -> None:
    values = np.random.default_rng(0).normal(size=20).tolist()
    one, again, other = (bootstrap(values, seed=seed, resamples=100) for seed in (3, 3, 4))
    assert one == again != other


def test_a_difference_is_paired() -> None:
    generator = np.random.default_rng(3)
    first = generator.normal(0, 10, size=50)
    second = first + generator.normal(1, 0.1, size=50)
    found = difference(first.tolist(), second.tolist())
    # Unpaired, the interval would be about 8 wide.
    assert found.mean == pytest.approx(1, abs=0.1) and found.low > 0.9 and found.high < 1.1
    assert difference([3.0, 3.0], [1.0, 1.0]) == Estimate(-2.0, -2.0, -2.0, 2)


def test_one_row_gives_its_value() -> None:
    assert bootstrap([2.5]) == Estimate(2.5, 2.5, 2.5, 1)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [[1.0], [2.0]]])
def test_what_has_no_mean_is_refused(values) -> None:
    with pytest.raises(ValueError, match="at least one finite number"):
        bootstrap(values)


def test_unequal_lists_are_no_pairs() -> None:
    with pytest.raises(ValueError, match="1 and 2 values"):
        difference([1.0], [1.0, 2.0])


# R: binom::binom.confint(x, n, methods = "wilson")
@pytest.mark.parametrize(
    ("share", "n", "low", "high"), [(0.0, 10, 0.0, 0.2775), (0.5, 10, 0.2366, 0.7634), (0.9, 100, 0.8256, 0.9448)]
)
def test_wilson_gives_the_textbook_interval(share: float, n: int, low: float, high: float) -> None:
    found = wilson(share, n)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert wilson(1 - share, n).low == pytest.approx(1 - high, abs=1e-4)


@pytest.mark.parametrize(("share", "n"), [(1.1, 5), (-0.1, 5), (0.5, 0), (float("nan"), 3)])
def test_impossible_shares_are_refused(share: float, n: int) -> None:
    with pytest.raises(ValueError, match="impossible"):
        wilson(share, n)
