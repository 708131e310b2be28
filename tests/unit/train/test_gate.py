"""The gate as a state machine: open, longer, closed for good."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from gadcore.config.curriculum import GateSettings
from gadcore.train.gate import Gate

SETTINGS = GateSettings(low=0.55, high=0.98, every=5, extra_steps=12)


@pytest.mark.parametrize(
    ("accuracy", "is_open"), [(0.0, False), (0.54, False), (0.55, True), (0.8, True), (0.98, True), (0.99, False)]
)
def test_it_opens_between_its_bounds(accuracy: float, is_open: bool) -> None:
    gate = Gate().look(10, accuracy)
    assert gate.is_open(SETTINGS) is is_open
    assert gate.further_steps(SETTINGS) == (0 if is_open else 5)
    assert not gate.fails(SETTINGS)
    assert ("the GAD stage begins" in gate.message(SETTINGS)) is is_open


def walk(accuracies: list[float], settings: GateSettings) -> Gate:
    """The gate of a run whose measurements these are."""
    gate, step = Gate(), 10
    for accuracy in accuracies:
        gate = gate.look(step, accuracy)
        more = gate.further_steps(settings)
        gate, step = gate.extended(more), step + more
    return gate


def test_extra_steps_come_in_portions_and_end() -> None:
    gate = walk([0.5, 0.5, 0.5], SETTINGS)
    assert [step for step, _ in gate.measured] == [10, 15, 20] and gate.extra == 12
    assert "goes on" not in gate.message(SETTINGS)
    gate = walk([0.5] * 4, SETTINGS)
    assert [step for step, _ in gate.measured] == [10, 15, 20, 22] and gate.extra == 12
    assert gate.fails(SETTINGS) and "the run stops" in gate.message(SETTINGS)
    assert "raise discriminator.lr" in gate.advice(SETTINGS) and "gate.extra_steps" in gate.advice(SETTINGS)


def test_it_may_be_told_to_go_on() -> None:
    settings = SETTINGS.model_copy(update={"when_closed": "go_on"})
    gate = walk([1.0] * 4, settings)
    assert not gate.fails(settings) and gate.further_steps(settings) == 0
    assert "begins all the same" in gate.message(settings)
    assert "raise student.warmup_lr" in gate.advice(settings)


def test_it_opens_after_a_while() -> None:
    gate = walk([0.5, 0.99, 0.7], SETTINGS)
    assert gate.is_open(SETTINGS) and gate.extra == 10
    assert "after 10 further warmup steps" in gate.message(SETTINGS)


def test_more_extra_steps_go_on_where_it_failed() -> None:
    gate = walk([0.5] * 4, SETTINGS)
    assert gate.further_steps(SETTINGS.model_copy(update={"extra_steps": 14})) == 2


def test_a_gate_comes_back_from_json() -> None:
    gate = walk([0.5, 0.6], SETTINGS)
    assert Gate.of(json.loads(json.dumps(asdict(gate)))) == gate
    assert Gate.of({}) == Gate()


def test_an_unmeasured_gate_says_nothing() -> None:
    with pytest.raises(ValueError, match="not measured"):
        Gate().is_open(SETTINGS)
