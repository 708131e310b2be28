"""Phases: seconds go to the phase that is on, once, and nothing nests."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from gadcore.train import phases as module
from gadcore.train.phases import PHASES, Phases


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "perf_counter", clock)
    return clock


def spend(phases: Phases, name: str, clock: Clock, seconds: float) -> None:
    with phases(name):
        clock.now += seconds


def test_seconds_add_up_per_phase_and_time_between_phases_is_nobodys(clock: Clock) -> None:
    phases = Phases()
    assert phases.seconds == dict.fromkeys(PHASES, 0.0)
    spend(phases, "rollout", clock, 2.0)
    clock.now += 50.0
    spend(phases, "student", clock, 3.0)
    spend(phases, "rollout", clock, 4.0)
    assert phases.seconds == dict.fromkeys(PHASES, 0.0) | {"rollout": 6.0, "student": 3.0}


def test_a_step_is_taken_once_and_the_totals_stay(clock: Clock) -> None:
    phases = Phases()
    assert phases.take_step() == {}
    spend(phases, "rollout", clock, 2.0)
    spend(phases, "discriminator", clock, 0.0)
    assert phases.take_step() == {"rollout": 2.0}
    assert phases.take_step() == {}
    spend(phases, "rollout", clock, 1.0)
    assert phases.take_step() == {"rollout": 1.0}
    assert phases.seconds["rollout"] == 3.0


def test_a_resumed_run_goes_on_counting(clock: Clock) -> None:
    phases = Phases()
    phases.seconds["rollout"] += 10.0
    spend(phases, "rollout", clock, 2.0)
    assert phases.seconds["rollout"] == 12.0
    assert phases.take_step() == {"rollout": 2.0}


def test_an_error_inside_is_counted_and_passed_on(clock: Clock) -> None:
    phases = Phases()
    with pytest.raises(ZeroDivisionError), phases("student"):
        clock.now += 5.0
        raise ZeroDivisionError
    assert phases.seconds["student"] == 5.0
    spend(phases, "student", clock, 1.0)
    assert phases.take_step() == {"student": 6.0}


@pytest.mark.parametrize("inner", ["rollout", "student"])
def test_phases_do_not_nest(clock: Clock, inner: str) -> None:
    phases = Phases()
    with phases("student"):
        clock.now += 1.0
        with pytest.raises(RuntimeError, match=f"phase {inner} begins inside phase student"), phases(inner):
            pytest.fail("the inner phase began")
        clock.now += 1.0
    assert phases.take_step() == {"student": 2.0}


def test_every_phase_is_told_once_at_its_end_also_where_it_fails(clock: Clock) -> None:
    spans: list[tuple[str, float, float]] = []
    phases = Phases(lambda *span: spans.append(span))
    spend(phases, "rollout", clock, 2.0)
    clock.now += 10.0
    with pytest.raises(ZeroDivisionError), phases("student"):
        clock.now += 3.0
        raise ZeroDivisionError
    assert spans == [("rollout", 100.0, 102.0), ("student", 112.0, 115.0)]


def test_who_holds_the_device_keeps_it_while_another_phase_is_waited_for(clock: Clock) -> None:
    class Memory:
        entered: list[str] = []

        def explained(self):
            return nullcontext()

        def enter(self, state: str) -> None:
            self.entered.append(state)

        def finish_work(self) -> None: ...

    phases = Phases()
    phases.memory = memory = Memory()  # type: ignore[assignment]
    spend(phases, "discriminator", clock, 2.0)
    with phases.without_state("rollout"):
        clock.now += 3.0
        with pytest.raises(RuntimeError, match="phase student begins inside phase rollout"), phases("student"):
            pytest.fail("the inner phase began")
    assert memory.entered == ["discriminator"]
    assert phases.take_step() == {"rollout": 3.0, "discriminator": 2.0}
