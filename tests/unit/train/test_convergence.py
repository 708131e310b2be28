"""The convergence rule as a state machine over accuracies."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from gadcore.config.settings import ConvergenceSettings
from gadcore.train.convergence import Convergence, stop_reason

SETTINGS = ConvergenceSettings(patience=3, tolerance=0.01, rise=0.1)


@pytest.mark.parametrize(
    ("accuracies", "stopped"),
    [
        ([0.9], None),
        ([0.9, 0.8, 0.7, 0.6, 0.55], None),
        ([0.9, 0.9, 0.9], None),
        ([0.9, 0.9, 0.9, 0.9], "plateau"),
        ([0.9, 0.895, 0.891, 0.9], "plateau"),
        ([0.9, 0.895, 0.889, 0.9], None),
        ([0.9, 0.6, 0.65, 0.66, 0.62], "plateau"),
        ([0.9, 0.6, 0.65, 0.5, 0.55], None),
        ([0.6, 0.69], None),
        ([0.6, 0.7], "rise"),
        ([0.9, 0.6, 0.65, 0.66, 0.75], "rise"),
        # A fall that is slower than the tolerance, again and again, is a plateau too.
        ([0.9, 0.897, 0.894, 0.891], "plateau"),
    ],
)
def test_when_the_stage_ends(accuracies: list[float], stopped: str | None) -> None:
    assert stop_reason(accuracies, SETTINGS) == stopped


def walk(accuracies: list[float]) -> Convergence:
    state = Convergence()
    for i, accuracy in enumerate(accuracies):
        state = state.look(10 * i, accuracy, (accuracy - 0.05, accuracy + 0.05), SETTINGS)
    return state


def test_the_minimum_is_the_earliest_of_equals() -> None:
    assert walk([0.9, 0.7, 0.8, 0.7]).best == (10, 0.7)
    assert Convergence().best is None and Convergence().summary() is None


def test_a_rise_names_the_step_to_go_back_to() -> None:
    state = walk([0.9, 0.7, 0.75, 0.82])
    assert state.stopped == "rise"
    assert state.message().endswith(
        "0.820 (0.770 to 0.870) at step 30, up from 0.700 at step 10: the GAD stage ends, back to step 10."
    )


def test_what_is_said_on_the_way() -> None:
    assert walk([0.9, 0.7]).message().endswith("at step 10, a new minimum.")
    assert walk([0.9, 0.7, 0.75]).message().endswith("at step 20, minimum 0.700 at step 10.")
    ended = walk([0.9, 0.7, 0.75, 0.7, 0.71]).message()
    assert "no longer falls, the GAD stage ends with the student of step 10" in ended


def test_the_state_comes_back_from_json() -> None:
    state = walk([0.9, 0.7, 0.82])
    assert Convergence.of(json.loads(json.dumps(asdict(state)))) == state
    assert state.summary() == {**asdict(state), "best": (10, 0.7)}
    assert Convergence.of({}) == Convergence()
