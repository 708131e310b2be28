"""A run that was killed or stopped and goes on is, to the bit, the run that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gadcore.files import LOCK, held, temporary
from tests.support.runs import ROOT, assert_same_run, records, run, tiny_arguments, write_rows

# The moment, and the call of it that is killed: during warmup, at the border of the stages, during GAD.
MOMENTS = [("rollout", 3), ("rollout", 7), ("update", 2), ("update", 6), ("checkpoint", 3), ("checkpoint", 8)]


@pytest.fixture(scope="module")
def whole(module_folder):
    done = run([*tiny_arguments(module_folder), "--run.dir", "run", "--checkpoint.keep", "2"], module_folder)
    assert done.returncode == 0, done.stderr
    return module_folder


def killed_then_resumed(whole: Path, folder: Path, moment: str, count: int, engine: str = "hf") -> None:
    killer = [sys.executable, str(ROOT / "tests/support/killed_run.py"), moment, str(count), "--"]
    arguments = [*tiny_arguments(whole, engine), "--run.dir", str(folder / "run"), "--tracking.trace", "true"]
    killed = run(arguments, folder, command=killer)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder / "run/summary.json").exists()
    assert json.loads((folder / "run/trace.json").read_text() + "]")
    resumed = run(["--run.dir", "run", "--resume", "auto"], folder)
    assert resumed.returncode == 0, resumed.stderr
    assert_watched(folder / "run")


def assert_watched(path: Path) -> None:
    """Every step has figures of the machine, and a span in a trace that both processes wrote."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert all(row["machine/cpu_load"] > 0 and row["machine/rss_gib"] > 0 for row in rows)
    events = json.loads((path / "trace.json").read_text())
    assert {e["args"]["step"] for e in events if "step" in e.get("args", {})} == {row["step"] for row in rows}
    assert [e["name"] for e in events if e["ph"] == "X"].count("setup") == 2


@pytest.mark.parametrize(("moment", "count"), MOMENTS)
def test_sigkill_and_resume(whole, tmp_path, moment, count) -> None:
    killed_then_resumed(whole, tmp_path, moment, count)
    assert_same_run(tmp_path / "run", whole / "run")


@pytest.mark.slow
def test_sigkill_and_resume_with_vllm(tmp_path) -> None:
    pytest.importorskip("vllm")
    done = run([*tiny_arguments(tmp_path, "vllm"), "--run.dir", "whole"], tmp_path)
    assert done.returncode == 0, done.stderr
    for moment, count in (("rollout", 7), ("update", 6), ("checkpoint", 8)):
        folder = tmp_path / moment
        folder.mkdir()
        killed_then_resumed(tmp_path, folder, moment, count, "vllm")
        assert_same_run(folder / "run", tmp_path / "whole")


@pytest.mark.parametrize(("number", "rows"), [(signal.SIGTERM, 1), (signal.SIGINT, 4)])
def test_signal_finishes_the_step_and_says_how_to_go_on(whole, tmp_path, number, rows) -> None:
    """During the warmup, and inside the GAD stage, where the reference must be saved too."""
    arguments = [*tiny_arguments(whole), "--run.dir", str(tmp_path / "run"), "--checkpoint.every", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "gadcore.run", *arguments], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run/metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < rows):
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number, stderr
    notice, message = [line for line in stderr.splitlines() if line.startswith("gadcore: ")]
    assert "finishing the step" in notice
    assert "--resume auto" in message and "saved" in message
    command = message.split("go on with: ")[1].split()
    assert command[:3] == [sys.executable, "-m", "gadcore.run"]
    resumed = run([*command[3:], "--checkpoint.every", "2"], tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(tmp_path / "run", whole / "run")


def test_resume_before_the_first_checkpoint_starts_again(whole, tmp_path) -> None:
    killed_then_resumed(whole, tmp_path, "update", 1)
    assert_same_run(tmp_path / "run", whole / "run")


def written(folder: Path) -> dict[Path, tuple[int, int]]:
    """When everything in a folder was written, and its size."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_a_finished_run_is_finished_and_goes_back_only_when_told(whole, tmp_path) -> None:
    shutil.copytree(whole / "run", tmp_path / "run")
    before = written(tmp_path / "run")
    again = run(["--run.dir", "run", "--resume", "auto"], tmp_path)
    assert again.returncode == 0 and "the run run is finished, there is nothing to do" in again.stdout, again.stderr
    assert written(tmp_path / "run") == before
    # Killed in the last write of all.
    (tmp_path / "run/report.html").unlink()
    temporary(tmp_path / "run/report.html").write_text("half")
    again = run(["--run.dir", "run", "--resume", "auto"], tmp_path)
    assert again.returncode == 0 and written(tmp_path / "run").keys() == before.keys(), again.stderr

    with held(tmp_path / "run" / LOCK, "x"):
        refused = run(["--run.dir", "run", "--resume", "step-000007"], tmp_path)
    assert refused.returncode == 2 and f"the run run is in use by process {os.getpid()} on " in refused.stderr
    assert written(tmp_path / "run").keys() == before.keys()


def test_a_run_goes_back_to_a_checkpoint(whole, tmp_path) -> None:
    shutil.copytree(whole / "run", tmp_path / "run")
    steps = [path.name for path in sorted((tmp_path / "run/checkpoints").iterdir())]
    assert steps == ["step-000006", "step-000007"]
    back = run(["--run.dir", "run", "--resume", "step-000006"], tmp_path)
    assert back.returncode == 0 and "what came after step 6 is set aside" in back.stdout, back.stderr
    assert_same_run(tmp_path / "run", whole / "run")
    assert records(tmp_path / "run/abandoned-after-000006") == records(whole / "run")
    aside = {path.name for path in (tmp_path / "run/abandoned-after-000006").iterdir()}
    assert {"summary.json", "report.html", "student", "discriminator", "evaluations"} <= aside
    assert (tmp_path / "run/checkpoints/abandoned-step-000007").is_dir()


def test_a_run_goes_on_with_its_own_rows_and_records_alone(whole, tmp_path) -> None:
    shutil.copytree(whole / "run", tmp_path / "run")
    evaluation = tmp_path / "run/evaluations/before.jsonl"
    rows = evaluation.read_text().splitlines(keepends=True)
    evaluation.write_text("".join([*rows[1:], rows[0]]))
    before = written(tmp_path / "run")
    back = ["--run.dir", "run", "--resume", "step-000006"]
    refused = run(back, tmp_path)
    assert refused.returncode == 2 and f"before.jsonl has been changed in its first {len(rows)} rows" in refused.stderr
    evaluation.write_text("".join(rows))
    other = write_rows(tmp_path / "other.jsonl")
    other.write_text("".join(reversed(other.read_text().splitlines(keepends=True))))
    refused = run([*back, "--data.train", str(other)], tmp_path)
    assert refused.returncode == 2 and "the training rows are not those of the checkpoint of step 6" in refused.stderr
    assert written(tmp_path / "run").keys() == before.keys()


def test_a_start_that_fails_leaves_nothing(whole, tmp_path) -> None:
    """It fails where models are loaded, when the folder is there already."""
    arguments = [*tiny_arguments(whole), "--run.dir", "run"]
    model = tmp_path / "model"
    shutil.copytree(whole / "model", model)
    os.truncate(model / "model.safetensors", 1000)
    failed = run([*arguments, "--student.model", str(model)], tmp_path)
    assert failed.returncode == 2, failed.stderr
    assert os.listdir(tmp_path) == ["model"]


def test_seqkd_runs_and_is_resumed_only_as_such(whole, tmp_path) -> None:
    done = run(["seqkd", *tiny_arguments(whole), "--run.dir", "run"], tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert list(summary["evaluations"]) == ["before", "after_seqkd"]
    assert not (tmp_path / "run/discriminator").exists()
    ces = [row["student/ce"] for row in records(tmp_path / "run")]
    assert len(ces) == 3 and ces[-1] < ces[0]

    refused = run(["--run.dir", "run", "--resume", "auto"], tmp_path)
    assert refused.returncode == 2
    assert "is a run of seqkd, not of warmup and gad" in refused.stderr
    resumed = run(["seqkd", "--run.dir", "run", "--resume", "auto"], tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert [row["student/ce"] for row in records(tmp_path / "run")] == ces
    assert "the run run is finished" in resumed.stdout
