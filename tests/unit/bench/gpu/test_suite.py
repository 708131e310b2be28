"""python -m bench gpu: which stages, in which order, what is written when, and what a failure costs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import __main__ as command
from bench import record
from bench.gpu import child, suite
from bench.gpu.place import Place, failed
from bench.gpu.stages import STAGES, Stage
from gadcore.errors import UserError

DEFAULT = ["gradients", "colocation", "attention", "head", "micro_batch", "eager", "graphs"]


def test_the_stages_by_default_fit_into_ten_minutes_the_cheapest_answer_first() -> None:
    assert suite.chosen(None, []) == DEFAULT
    assert sum(STAGES[name].seconds for name in DEFAULT) <= 0.9 * 60 * suite.MINUTES
    # Each is found, and takes a place.
    assert all(callable(stage.function()) for stage in STAGES.values())


def test_stages_are_chosen_by_name() -> None:
    assert suite.chosen(["graphs", "head"], []) == ["head", "graphs"]
    assert suite.chosen(None, ["head", "eager"]) == [n for n in DEFAULT if n not in ("head", "eager")]
    assert suite.chosen(["opponents"], []) == ["opponents"]
    with pytest.raises(UserError, match="there is no stage heads: use gradients, "):
        suite.chosen(["heads"], [])


def test_without_a_gpu_nothing_is_measured_and_nothing_fails(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(suite, "_gpu", lambda: False)
    assert command.main(["gpu", "--out", str(tmp_path / "gpu.json")]) == 0
    assert capsys.readouterr().out.startswith("skipped: no CUDA device") and not (tmp_path / "gpu.json").exists()
    assert command.main(["gpu", "--only", "heads"]) == 2


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages of one row, and one between them that breaks off after a row; in this process, on the CPU."""

    def good(place: Place) -> Iterator[dict]:
        yield {"case": "a", "status": "ok", "seconds": 1.0}

    def bad(place: Place) -> Iterator[dict]:
        yield {"case": "b", "status": "ok"}
        raise RuntimeError("CUDA error: an illegal memory access")

    functions = {"first": good, "second": bad, "third": good}
    monkeypatch.setattr(Stage, "function", lambda stage: functions[stage.rows])
    made = {name: Stage(name, "", 10) for name in functions}
    for module in (suite, child):
        monkeypatch.setattr(module, "STAGES", made)


def test_a_stage_that_fails_is_a_row_and_the_others_go_on(stages, tmp_path: Path, capsys) -> None:
    out = tmp_path / "gpu.json"
    kept = {"stage": "first", "case": "a", "machine": {"gpu": "another"}, "commit": "x"}
    record.write(out, [kept])
    assert command.main(["gpu", "--rehearse", "--out", str(out)]) == 1
    rows = record.read(out)
    assert rows[0] == kept, "what another GPU left"
    found = [(row["stage"], row["case"], row["status"]) for row in rows[1:]]
    assert found == [("first", "a", "ok"), ("second", "b", "ok"), ("second", "all", "failed"), ("third", "a", "ok")]
    assert rows[3]["error"] == "CUDA error: an illegal memory access" and rows[3]["gate"] == "fail"
    said = capsys.readouterr().err
    assert said.startswith("gpu: 3 stages, 30 s predicted on an H100 or H200:")
    # The same again takes the place of what is there.
    assert command.main(["gpu", "--rehearse", "--skip", "second", "--out", str(out)]) == 0
    assert len(record.read(out)) == 5


def test_a_rehearsal_writes_nothing_unless_asked(stages, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(record, "path_of", lambda name: tmp_path / "gpu.json")
    assert command.main(["gpu", "--rehearse", "--skip", "second"]) == 0
    assert not (tmp_path / "gpu.json").exists() and "not written" in capsys.readouterr().out


def test_every_row_is_in_the_file_before_the_next_is_measured(stages, tmp_path: Path, monkeypatch) -> None:
    """So that a machine that is taken away leaves what it has found."""
    out = tmp_path / "gpu.json"

    def killed(name: str, place: Place) -> Iterator[dict]:
        yield {"case": "a", "status": "ok"}
        assert [row["case"] for row in record.read(out)] == ["a"]
        raise KeyboardInterrupt

    monkeypatch.setattr(child, "here", killed)
    with pytest.raises(KeyboardInterrupt):
        command.main(["gpu", "--rehearse", "--out", str(out)])
    assert [row["case"] for row in record.read(out)] == ["a"]


def test_on_a_gpu_every_stage_is_a_process_and_none_begins_that_would_end_too_late(stages, monkeypatch, capsys) -> None:
    began: list[tuple[str, list[str], float]] = []

    def process(name: str, flags: list[str], limit: float) -> Iterator[dict]:
        began.append((name, flags, limit))
        return iter([{"case": "a", "status": "ok", "machine": {"gpu": "NVIDIA H100"}}])

    monkeypatch.setattr(suite, "_gpu", lambda: True)
    monkeypatch.setattr(child, "in_child", process)
    assert [row["stage"] for row in suite.run(quick=True)] == ["first", "second", "third"]
    assert began == [(name, ["--quick"], 60.0) for name in ("first", "second", "third")]
    rows = list(suite.run(quick=False, minutes=0.1))
    assert [row["status"] for row in rows] == ["skipped"] * 3 and "s were left" in rows[0]["error"]


def test_a_process_that_dies_or_hangs_is_a_row(monkeypatch) -> None:
    real = subprocess.Popen

    def instead(code: str):
        def start(command: list[str], **options):
            return real([sys.executable, "-c", code, command[command.index("--to") + 1]], **options)

        return start

    row = 'import os, sys; os.write(int(sys.argv[1]), b\'{"case": "a"}\\n\'); '
    for code, limit, told in (
        (row + "os.kill(os.getpid(), 11)", 60.0, "the stage's process ended with signal SIGSEGV"),
        (row + "sys.exit(3)", 60.0, "the stage's process ended with exit code 3"),
        (row + "import time; time.sleep(60)", 1.0, "ended after 1 s"),
    ):
        monkeypatch.setattr(child.subprocess, "Popen", instead(code))
        assert list(child.in_child("head", [], limit)) == [{"case": "a"}, failed("all", told)]


def test_results_of_another_case_gpu_or_opponent_stay() -> None:
    case = {"stage": "attention", "case": "ours", "machine": {"gpu": "H100"}}
    others = [case | {"case": "SDPA"}, case | {"stage": "head"}, case | {"machine": {"gpu": "H200"}}]
    assert suite.key(case) == suite.key(case | {"commit": "another", "gate": "fail"})
    assert suite.key(case) not in map(suite.key, others)
    result = {"stage": "head", "op": "bt_score", "opponent": "x", "shape": {"T": 1}, "machine": {"gpu": "H100"}}
    assert suite.key(result) != suite.key(result | {"opponent": "y"})
    assert json.loads(suite.key(result))[0] == "H100"
