"""The clock by phases."""

from __future__ import annotations

import time

import pytest

from bench.step.worker import Clock


def test_nested_phases_count_once() -> None:
    clock = Clock()
    with clock("outer"):
        time.sleep(0.02)
        with clock("inner"):
            time.sleep(0.05)
    with clock("inner"):
        time.sleep(0.01)
    clock.lap()
    assert set(clock.wall) == {"other", "outer", "inner"}
    assert 0.015 < clock.wall["outer"] < 0.05
    assert clock.wall["inner"] > 0.055
    # Sleeping takes no processor.
    assert clock.cpu["inner"] < 0.03


def test_a_phase_ends_where_its_call_raises() -> None:
    class Owner:
        def fail(self) -> None:
            raise ValueError

    clock, owner = Clock(), Owner()
    clock.wrap(owner, "fail", lambda: "phase")
    with pytest.raises(ValueError):
        owner.fail()
    clock.reset()
    time.sleep(0.01)
    clock.lap()
    assert set(clock.wall) == {"other"}
