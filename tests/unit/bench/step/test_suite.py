"""The suite `step` from the command line, without a measurement."""

from __future__ import annotations

from typing import Any

import pytest

from bench import __main__ as command
from bench import record
from bench.step import suite
from bench.step.process import ALONE, OURS, TRL
from tests.support.bench_steps import answer, row


def test_rows_of_other_cases_stay_in_the_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "step.json"
    record.write(out, [row(case="64x32", note="old"), row(case="256x64", note="old")])
    monkeypatch.setattr(suite, "run", lambda *_, **__: iter([row(case="64x32", note="new")]))
    assert command.main(["step", "--cases", "64x32", "--out", str(out)]) == 0
    assert [(r["case"], r["note"]) for r in record.read(out)] == [("64x32", "new"), ("256x64", "old")]


def test_a_failed_gate_is_an_exit_code(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "run", lambda *_, **__: iter([row(gate="fail")]))
    assert command.main(["step", "--out", str(tmp_path / "step.json")]) == 1


def test_unknown_cases_and_missing_rows_are_refused(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["step", "--cases", "64x33"]) == 2
    assert "64x33" in capsys.readouterr().err
    assert (
        command.main(["step", "--cases", "real", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "o")]) == 2
    )
    assert "--data" in capsys.readouterr().err
    assert command.main(["step", "--beside", "verl"]) == 2
    assert "no opponent verl" in capsys.readouterr().err


@pytest.mark.parametrize("own", [(OURS, ALONE), (OURS,)])
def test_each_of_our_sides_takes_its_turns_with_the_opponent(
    own: tuple[str, ...], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The three at once would not fit into memory; a wrong gradient of either fails the gate."""
    measurement = suite.Measurement(tmp_path, False, tmp_path, [TRL], own)
    path = tmp_path / "problem.json"
    path.write_text('{"groups": []}')
    taken: list[tuple[str, ...]] = []

    def turns(problem: Any, threads: int, names: tuple[str, ...]) -> tuple[suite.Turns, Any]:
        taken.append(names)
        seconds = {OURS: 2.0, ALONE: 4.0}[names[0]]
        return {
            names[0]: [answer(ours=True, generate=seconds, policy=seconds)],
            TRL: [answer(ours=False, policy=16.0)],
        }, names[0]

    monkeypatch.setattr(measurement, "_turns", turns)
    monkeypatch.setattr(measurement, "problem", lambda *_, **__: path)
    measurement._errors[False] = dict.fromkeys((*own, TRL), {"rewards": 1e-7})
    (found,) = measurement.rows(suite.QUICK, 1, [TRL])
    assert taken == [(side, TRL) for side in own]
    assert (found["ratio"], found["gate"], found["profile"]) == (4.0, "pass", OURS)
    assert (found["schedule_alone"] or {}).get("ratio") == (2.0 if ALONE in own else None)
    measurement._errors[False][own[-1]] = {"rewards": 1e-3}
    (found,) = measurement.rows(suite.QUICK, 1, [TRL])
    assert found["gate"] == "fail"
