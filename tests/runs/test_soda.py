"""The baseline `soda` from the command line: what it learns from, what it leaves, and how it goes on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from gadcore.checkpoint import store
from gadcore.run import main
from gadcore.train import snapshot
from tests.support.runs import records, tiny_arguments


class Killed(BaseException):
    """In place of a kill: nothing handles it."""


def soda(base: Path, to: Path, *more: str) -> int:
    arguments = [*tiny_arguments(base), "--run.dir", str(to), "--tracking.monitor_interval", "0"]
    return main(["soda", *arguments, "--student.soda_lr", "1e-3", "--schedule.soda_epochs", "2", *more])


@pytest.fixture(scope="module")
def whole(module_folder: Path) -> Path:
    """The folder of model and data, and in it a run of six steps whose snapshot has parts of three rows."""
    patch = pytest.MonkeyPatch()
    patch.setattr(snapshot, "PART", 3)
    assert soda(module_folder, module_folder / "run", "--algorithm.soda_samples", "2") == 0
    patch.undo()
    return module_folder


def parts(run: Path) -> list[dict]:
    return [
        row
        for path in sorted((run / "snapshot").glob("*.arrow"))
        for row in pa.ipc.open_file(path).read_all().to_pylist()
    ]


def test_it_learns_from_one_snapshot_of_its_own(whole) -> None:
    run = whole / "run"
    rows, made = records(run), parts(run)
    assert [row["stage_step"] for row in rows] == [1, 2, 3, 4, 5, 6] and {row["stage"] for row in rows} == {"soda"}
    assert sorted(row["index"] for row in made) == list(range(10))
    assert all(len(row["text"]) == len(row["tokens"]) == 2 and len(row["reference"]) == 3 for row in made)
    # The first step's student is the snapshot itself; a later one has moved, towards the teacher.
    assert rows[0]["preference/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["preference/margin"] == pytest.approx(0, abs=1e-4)
    assert rows[-1]["preference/margin"] > 0.01 and rows[-1]["preference/loss"] < 0.69
    assert not any("tokens/sampled" in row for row in rows)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tokens"]["sampled"] == sum(len(ids) for row in made for ids in row["tokens"])
    assert summary["models"]["discriminator"] is None and not (run / "discriminator").exists()
    assert list(summary["evaluations"]) == ["before", "after_soda"] and summary["steps"] == {"soda": 6}
    page = (run / "report.html").read_text()
    assert "Preference margin" in page and "after SODA" in page


def assert_same(ours: Path, theirs: Path) -> None:
    assert records(ours) == records(theirs)
    for name in ("student/model.safetensors", "evaluations/before.jsonl", "evaluations/after_soda.jsonl"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    assert parts(ours) == parts(theirs)
    one, two = (json.loads((path / "summary.json").read_text()) for path in (ours, theirs))
    assert one["tokens"] == two["tokens"] and one["evaluations"] == two["evaluations"]


@pytest.mark.parametrize(("owner", "name", "call"), [(snapshot, "write_whole", 3), (store, "save_file", 5)])
def test_a_run_that_was_killed_goes_on_to_the_bit(whole, tmp_path, monkeypatch, owner, name, call) -> None:
    """While the second part of the snapshot is written, and inside the second checkpoint, of step 4."""
    monkeypatch.setattr(snapshot, "PART", 3)
    original, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wrapped)
        with pytest.raises(Killed):
            # The first step of a run makes its folder stay; before that a kill leaves what a real one would.
            patch.setattr("gadcore.record.run_folder.remove", lambda path: None)
            soda(whole, tmp_path / "run", "--algorithm.soda_samples", "2")
    assert not (tmp_path / "run/summary.json").exists()
    drawn = sorted(path.name for path in (tmp_path / "run/snapshot").glob("*.arrow"))
    assert len(drawn) == (1 if owner is snapshot else 4)
    before = {name: (tmp_path / "run/snapshot" / name).stat().st_mtime_ns for name in drawn}
    assert main(["soda", "--run.dir", str(tmp_path / "run"), "--resume", "auto"]) == 0
    assert {name: (tmp_path / "run/snapshot" / name).stat().st_mtime_ns for name in drawn} == before
    assert_same(tmp_path / "run", whole / "run")


def test_a_snapshot_that_is_gone_or_of_other_settings_is_told(whole, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(snapshot, "PART", 3)
    run = tmp_path / "run"
    shutil.copytree(whole / "run", run)
    (run / "summary.json").unlink()
    (run / "snapshot/part-000002.arrow").unlink()
    arguments = ["soda", "--run.dir", str(run), "--resume", "step-000004"]
    assert main(arguments) == 2
    assert "part-000002.arrow is missing): put it back as it was, or start a new run" in capsys.readouterr().err
    (run / "snapshot/part-000000.arrow").write_bytes(b"none")
    assert main(arguments) == 2
    assert "part-000000.arrow is damaged" in capsys.readouterr().err
    assert main([*arguments, "--algorithm.soda_samples", "1"]) == 2
    assert "made-from.json is missing or of other settings" in capsys.readouterr().err


def test_cross_entropy_before_it(whole, tmp_path) -> None:
    assert soda(whole, tmp_path / "run", "--schedule.sft_epochs", "1", "--schedule.soda_steps", "1") == 0
    rows = records(tmp_path / "run")
    assert [row["stage"] for row in rows] == ["sft"] * 3 + ["soda"]
    # The snapshot is of the student that cross-entropy has made.
    assert rows[-1]["preference/margin"] == pytest.approx(0, abs=1e-4)
    assert [row["text"] for row in parts(tmp_path / "run")] != [row["text"][:1] for row in parts(whole / "run")]
