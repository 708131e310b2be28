"""Fair order: every side takes turns, in rounds that fill the time."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from bench.record import ratio_of
from bench.runner import Rounds, Side, interleave, order


def side(name: str, calls: list[str], **options: Any) -> Side:
    def call() -> dict[str, Tensor]:
        calls.append(name)
        return {}

    return Side(name, call, **options)


# -- the runner


def test_every_side_goes_first_as_often_as_any_other() -> None:
    sides = [side(name, []) for name in "abc"]
    firsts = [order(sides, index)[0].name for index in range(6)]
    lasts = [order(sides, index)[-1].name for index in range(6)]
    assert sorted(firsts) == sorted(lasts) == [*"aabbcc"]


def test_sides_take_turns_and_get_equally_many_rounds() -> None:
    calls: list[str] = []
    slow = [side(name, calls, prepare=lambda: calls.append("prepared")) for name in "ab"]
    runs = interleave(slow, Rounds(4, 4, 0.0), lambda call, n: (call(), 1.0)[1])
    assert {name: len(seconds) for name, seconds in runs.items()} == {"a": 4, "b": 4}
    done = [name for name in calls if name != "prepared"]
    assert done == [*"abbabaab"]
    assert calls[::2] == ["prepared"] * 8


def test_short_calls_are_timed_many_at_a_time() -> None:
    calls: list[str] = []
    taken: list[int] = []

    def clock(call: Any, n: int) -> float:
        taken.append(n)
        return 1e-4

    interleave([side("a", calls), side("b", calls)], Rounds(2, 2, 0.0), clock, sample_s=0.01)
    assert taken == [1, 1, 100, 100, 100, 100]


def test_rounds_fill_the_time_within_their_bounds() -> None:
    assert [Rounds(2, 5, 10.0).within(seconds) for seconds in (0.0, 3.0, 100.0)] == [5, 3, 2]


def test_sides_need_different_names() -> None:
    with pytest.raises(ValueError, match="different names"):
        interleave([side("a", []), side("a", [])], Rounds(1, 1, 0.0))


def test_ratio_is_taken_round_by_round() -> None:
    """A machine that became ten times slower halfway through changes no ratio."""
    assert ratio_of([1.0, 1.0, 10.0, 10.0], [2.0, 2.0, 20.0, 20.0]) == 2.0
