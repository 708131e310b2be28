"""A run over several processes, from the command line to the report, beside the same run in one.

Samples are replayed: those that the run of one process drew. On the same samples the runs are the same up to the order
in which sums are added.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.jobs import Job, start_job, torchrun
from tests.support.runs import ROOT, assert_same_run, records, run, tiny_arguments

SCRIPT = str(ROOT / "tests/support/replayed_run.py")
# The default job's learning rates: with larger ones Adam makes much of the last bits of gradients that are nearly 0.
RATES = {"student.lr": 1e-5, "student.warmup_lr": 5e-5, "discriminator.lr": 3e-5}
FIGURES = {
    "student/ce", "student/loss", "student/kl", "student/grad_norm", "discriminator/loss", "discriminator/grad_norm",
    "discriminator/margin", "reward/mean", "reward/std", "sampler/logprob_diff_mean",
}  # fmt: skip


def arguments(folder: Path, *others: str) -> list[str]:
    rates = [item for key, value in RATES.items() for item in (f"--{key}", str(value))]
    return [*tiny_arguments(folder), *rates, "--tracking.monitor_interval", "0", *others]


def replayed(folder: Path, size: int, name: str, *others: str, faults: tuple[str, ...] = ()) -> Job:
    command = [SCRIPT, "replay", str(folder / "samples.json"), *faults, "--"]
    command += arguments(folder, "--run.dir", name, *others)
    return start_job(size, command, folder / f"out-{name}", cwd=folder)


def resumed(folder: Path, size: int, name: str, *others: str) -> Job:
    command = [SCRIPT, "replay", str(folder / "samples.json"), "--", "--run.dir", name, "--resume", "auto", *others]
    return start_job(size, command, folder / f"out-{name}-resumed", cwd=folder)


def finished(job: Job, deadline: float = 600) -> str:
    codes = job.wait(deadline)
    assert codes == [0] * len(codes), [job.output(rank)[-3000:] for rank in range(len(codes))]
    return job.output(0)


@pytest.fixture(scope="module")
def one(module_folder: Path) -> Path:
    """The run of one process, which draws the samples."""
    command = [sys.executable, SCRIPT, "record", str(module_folder / "samples.json"), "--"]
    done = run(arguments(module_folder, "--run.dir", "one"), module_folder, command=command)
    assert done.returncode == 0, done.stderr
    return module_folder


@pytest.fixture(scope="module")
def two(one: Path) -> Path:
    """The same over two processes."""
    text = finished(replayed(one, 2, "two"))
    assert "status loading the student" in text
    return one


def assert_alike(ours: Path, theirs: Path, *, rel: float) -> None:
    """Two runs have the same figures and final weights, up to a relative difference; of losses near 0 to that of 1."""
    for mine, other in zip(records(ours), records(theirs), strict=True):
        assert mine.keys() == other.keys()
        for name in FIGURES & other.keys():
            assert mine[name] == pytest.approx(other[name], rel=rel, abs=rel), (mine["step"], name)
    for name in ("student", "discriminator"):
        if name == "discriminator" and not (theirs / name).exists():
            continue
        mine, other = (load_file(path / name / "model.safetensors") for path in (ours, theirs))
        assert mine.keys() == other.keys()
        for key, tensor in other.items():
            scale = tensor.abs().max().item()
            assert (mine[key] - tensor).abs().max().item() <= rel * scale, (name, key)


def test_two_processes_train_what_one_does(two: Path) -> None:
    assert_alike(two / "two", two / "one", rel=1e-5)
    summary = json.loads((two / "two/summary.json").read_text())
    assert summary["distributed"] == {
        "processes": 2, "nodes": 1, "shard": 2, "replicate": 1, "prompts_of_a_step": 4, "prompts_of_a_process": 2.0,
    }  # fmt: skip
    assert (two / "two/report.html").stat().st_size > 10_000
    assert "\nshard = 2\nreplicate = 1\n" in (two / "two/config.toml").read_text()
    for name in ("one", "two"):
        files = {path.name for path in (two / name / "student").iterdir()}
        assert "model.safetensors" in files and files == {path.name for path in (two / "one/student").iterdir()}


def test_the_first_process_alone_speaks(two: Path) -> None:
    other = (two / "out-two/output-1").read_text()
    assert "status" not in other and "step" not in other and "note" not in other, other


def test_a_signal_to_one_stops_all_and_they_go_on_to_the_bit(two: Path) -> None:
    """With everything that waits in files, and checkpoints that are written meanwhile."""
    others = ("--memory.offload", "file", "--checkpoint.asynchronous", "true", "--checkpoint.every", "2")
    job = replayed(two, 2, "stopped", *others)
    metrics = two / "stopped/metrics.jsonl"
    while job.processes[0].poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 4):
        time.sleep(0.05)
    job.signal(1, signal.SIGTERM)
    assert job.wait(120) == [128 + signal.SIGTERM] * 2, job.output(0)
    told = [line for rank in (0, 1) for line in job.output(rank).splitlines() if line.startswith("gadcore: ")]
    stopped, notice = sorted(told, key=lambda line: "finishing" in line)
    assert notice == "gadcore: rank 1: finishing the step, then saving"
    assert "stopped by SIGTERM to rank 1 after step" in stopped and stopped.endswith("--run.dir stopped --resume auto")
    finished(resumed(two, 2, "stopped"))
    assert_same_run(two / "stopped", two / "two")
    assert not any((two / "stopped/offload").rglob("*.*"))


def test_one_process_goes_on_where_two_stood(two: Path) -> None:
    """And says that it is the same run up to rounding alone."""
    finished(replayed(two, 2, "moved", "--schedule.gad_steps", "2"))
    (two / "moved/summary.json").unlink()
    command = [sys.executable, SCRIPT, "replay", str(two / "samples.json"), "--"]
    done = run(["--run.dir", "moved", "--resume", "step-000004", "--schedule.gad_steps", "4"], two, command=command)
    assert done.returncode == 0, done.stderr
    assert "the checkpoint is one of 2 processes, the run goes on with 1 process" in done.stdout
    assert_alike(two / "moved", two / "one", rel=1e-5)
    assert "\nshard = 0\nreplicate = 1\n" in (two / "moved/config.toml").read_text()


def test_soda_over_two_processes_is_that_of_one_and_goes_on_to_the_bit(module_folder: Path) -> None:
    """Each draws its part of the snapshot's samples; log-probs and parts are there once for all."""
    script, samples = SCRIPT, str(module_folder / "soda.json")
    own = ["soda", *arguments(module_folder, "--student.soda_lr", "1e-5", "--algorithm.soda_samples", "2")]
    command = [sys.executable, script, "record", samples, "--"]
    done = run([*own, "--run.dir", "soda-one"], module_folder, command=command)
    assert done.returncode == 0, done.stderr
    done = torchrun(2, [script, "replay", samples, "--", *own, "--run.dir", "soda-two"], module_folder)
    assert done.returncode == 0, done.stderr
    assert_alike(module_folder / "soda-two", module_folder / "soda-one", rel=1e-5)
    shutil.copytree(module_folder / "soda-two", module_folder / "soda-again")
    (module_folder / "soda-again/summary.json").unlink()
    back = ["soda", "--run.dir", "soda-again", "--resume", "step-000002"]
    finished(start_job(2, [script, "replay", samples, "--", *back], module_folder / "out-soda", cwd=module_folder))
    ours, theirs = (module_folder / name / "student/model.safetensors" for name in ("soda-again", "soda-two"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert records(module_folder / "soda-again") == records(module_folder / "soda-two")


def test_bad_input_is_told_once(one: Path) -> None:
    command = ["-m", "gadcore.run", *arguments(one, "--data.train", "nowhere.jsonl")]
    job = start_job(2, command, one / "out-bad", cwd=one)
    assert job.wait(120) == [2, 2]
    told = [line for rank in (0, 1) for line in job.output(rank).splitlines() if line.startswith("gadcore: ")]
    assert len(told) == 1 and "nowhere.jsonl" in told[0] and "rank" not in told[0]
    assert "Traceback" not in job.output(0) + job.output(1)
