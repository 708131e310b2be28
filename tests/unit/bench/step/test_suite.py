"""The suite `step` from the command line, without a measurement."""

from __future__ import annotations

from typing import Any

import pytest

from bench import __main__ as command
from bench import record
from bench.step import suite
from tests.support.bench_steps import row


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
