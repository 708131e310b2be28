"""The interval of a paired difference where rows are few."""

from __future__ import annotations

import random

import pytest

from gadcore.measure.intervals import _t, margin


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (29, 2.0452), (99, 1.9842), (9999, 1.9602)],
)  # the textbook's table
def test_the_quantile_of_students_t(freedom: int, expected: float) -> None:
    assert _t(freedom) == pytest.approx(expected, abs=4e-3)


def test_one_row_has_no_margin_and_a_true_change_is_outside_as_often_as_it_should() -> None:
    assert margin([0.3]) is None and margin([]) is None and margin([0.2, 0.2]) == 0
    rng = random.Random(0)
    outside = 0
    for _ in range(1000):
        drawn = [rng.gauss(1, 1) for _ in range(5)]
        outside += abs(sum(drawn) / 5 - 1) > margin(drawn)
    assert 30 <= outside <= 72
