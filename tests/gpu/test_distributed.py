"""What only GPUs can prove of several processes: FSDP2 and checkpoints over NCCL, its abort, and sampling beside."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path

import pytest
import torch

from gadcore.config.loading import load
from gadcore.rollout.server_process import ServerProcess, arguments, environment
from tests.runs.test_distributed import RATES, SCRIPT, finished
from tests.support.jobs import Job, start_job
from tests.support.runs import assert_same_run, records, run, tiny_arguments, write_rows
from tests.support.tiny import save_tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


def settings(folder: Path, *others: str, engine: str = "hf") -> list[str]:
    """In float32: in bfloat16 another cut of a batch is another rounding."""
    if not (folder / "model").exists():
        save_tiny(folder / "model", "qwen2", kv_heads=2, head_dim=64)
        write_rows(folder / "rows.jsonl")
    rates = [item for key, value in RATES.items() for item in (f"--{key}", str(value))]
    own = ["--tracking.monitor_interval", "0", "--run.device", "cuda", "--data.eval", "none", *others]
    return [*tiny_arguments(folder, engine), *rates, *own]


def replayed(folder: Path, size: int, name: str, *others: str, faults: tuple[str, ...] = ()) -> Job:
    command = [SCRIPT, "replay", str(folder / "samples.json"), *faults, "--", *settings(folder, "--run.dir", name)]
    return start_job(size, [*command, *others], folder / f"out-{name}", cwd=folder)


@pytest.fixture(scope="module")
def two(module_folder: Path) -> Path:
    """A run of one GPU, which draws the samples, and that of two."""
    for mode, size in (("record", 1), ("replay", 2)):
        command = [SCRIPT, mode, str(module_folder / "samples.json"), "--"]
        started = [*command, *settings(module_folder, "--run.dir", f"gpus-{size}")]
        finished(start_job(size, started, module_folder / f"out-{size}", cwd=module_folder))
    return module_folder


def test_two_gpus_train_what_one_does(two: Path) -> None:
    assert_alike(two / "gpus-2", two / "gpus-1")


def assert_alike(ours: Path, theirs: Path) -> None:
    for mine, other in zip(records(ours), records(theirs), strict=True):
        for name in ("student/ce", "student/loss", "discriminator/loss", "reward/mean", "student/grad_norm"):
            if name in other:
                assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), (mine["step"], name)


def test_adapters_on_two_gpus_train_as_on_one_and_go_on_to_the_bit(module_folder: Path) -> None:
    """Their gradients are added up over NCCL, rank after rank."""
    samples, adapters = (
        str(module_folder / "adapters.json"),
        ["--student.adapter", "lora", "--discriminator.adapter", "lora"],
    )
    for mode, size in (("record", 1), ("replay", 2)):
        own = settings(module_folder, "--run.dir", f"adapters-{size}", "--checkpoint.keep", "9", *adapters)
        command = [SCRIPT, mode, samples, "--", *own]
        finished(start_job(size, command, module_folder / f"out-adapters-{size}", cwd=module_folder))
    assert_alike(module_folder / "adapters-2", module_folder / "adapters-1")
    shutil.copytree(module_folder / "adapters-2", module_folder / "adapters-again")
    (module_folder / "adapters-again/summary.json").unlink()
    command = [SCRIPT, "replay", samples, "--", "--run.dir", "adapters-again", "--resume", "step-000004"]
    finished(start_job(2, command, module_folder / "out-adapters-again", cwd=module_folder))
    assert_same_run(module_folder / "adapters-again", module_folder / "adapters-2")


def test_asynchronous_checkpoints_off_the_device_go_on_to_the_bit(two: Path) -> None:
    others = ("--checkpoint.asynchronous", "true", "--memory.offload", "pinned", "--checkpoint.keep", "9")
    finished(replayed(two, 2, "asynchronous", *others))
    assert_same_run(two / "asynchronous", two / "gpus-2")
    shutil.copytree(two / "asynchronous", two / "again")
    (two / "again/summary.json").unlink()
    command = [SCRIPT, "replay", str(two / "samples.json"), "--", "--run.dir", "again", "--resume", "step-000004"]
    finished(start_job(2, command, two / "out-again", cwd=two))
    assert_same_run(two / "again", two / "gpus-2")


@pytest.mark.parametrize(("how", "seconds"), [("SIGKILL", 60), ("hang", 110)])
def test_a_process_that_fails_ends_the_job_over_nccl(two: Path, how: str, seconds: float) -> None:
    """NCCL's collectives are aborted: the others would wait for it for ever."""
    job = replayed(two, 2, f"failed-{how}", "--distributed.timeout_s", "40", faults=(f"1:update:3:{how}",))
    begin = time.monotonic()
    while "fault at" not in job.output(1) and time.monotonic() - begin < 120:
        time.sleep(0.1)
    failed = time.monotonic()
    job.wait(seconds)
    print(f"{how}: rank 0 had ended {time.monotonic() - failed:.1f} s after the fault")
    assert job.processes[0].poll() == 1 and time.monotonic() - failed < seconds
    assert "gadcore: rank 1 (" in job.output(0)


def test_the_next_batch_is_sampled_on_another_gpu_meanwhile(tmp_path: Path, monkeypatch) -> None:
    """The trainer on the first GPU, a server on the second: a step takes the longer of both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    chosen = settings(tmp_path, "--rollout.url", f"http://127.0.0.1:{port}", engine="vllm-server")
    chosen += ["--algorithm.importance_cap", "2", "--schedule.batch_size", "10", "--rollout.group_size", "64"]
    config = load(chosen)
    command = arguments(config, str(tmp_path / "model"), device="cuda", backend="nccl")
    variables = environment(config.rollout, "of-the-test", "nccl") | {"CUDA_VISIBLE_DEVICES": "1"}
    server = ServerProcess(command, variables, port)
    monkeypatch.setenv("GADCORE_SERVER_TOKEN", "of-the-test")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    seconds = {}
    try:
        for ahead in ("0", "1"):
            done = run([*chosen, "--rollout.ahead", ahead, "--run.dir", f"ahead-{ahead}"], tmp_path)
            assert done.returncode == 0, done.stderr
            lines = (tmp_path / f"ahead-{ahead}/metrics.jsonl").read_text().splitlines()
            rows = [row for row in map(json.loads, lines) if row["stage"] == "gad" and row["stage_step"] > 1]
            seconds[ahead] = [sum(row[f"time/{name}"] for row in rows) for name in ("rollout", "total")]
    finally:
        server.close()
    (drawing, one_by_one), (waiting, overlapped) = seconds["0"], seconds["1"]
    print(f"waited {drawing:.2f} s and {waiting:.2f} s for samples, of {one_by_one:.2f} s and {overlapped:.2f} s")
    hidden = min(drawing, one_by_one - drawing)
    assert drawing - waiting > 0.5 * hidden
