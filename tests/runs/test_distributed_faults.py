"""Runs over several processes by torchrun: failures of one of them, other meshes, other numbers, two nodes. By hand."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from gadcore.checkpoint import store
from tests.runs.test_distributed import SCRIPT, arguments, assert_alike, finished, replayed, resumed
from tests.support.jobs import start_job, torchrun
from tests.support.runs import assert_same_run, records, run

pytestmark = [pytest.mark.by_hand, pytest.mark.timeout(3600)]
TIMEOUT = 40.0


@pytest.fixture(scope="module")
def two(module_folder: Path) -> Path:
    """The run of one process, which draws the samples, and that of two."""
    command = [sys.executable, SCRIPT, "record", str(module_folder / "samples.json"), "--"]
    done = run(arguments(module_folder, "--run.dir", "one"), module_folder, command=command)
    assert done.returncode == 0, done.stderr
    finished(replayed(module_folder, 2, "two"))
    return module_folder


def launched(folder: Path, size: int, name: str, *others: str, faults=(), options=()) -> subprocess.CompletedProcess:
    """torchrun, with the output of every rank in a file of its own."""
    logs = ["--log-dir", str(folder / f"logs-{name}"), "--redirects", "3", *options]
    command = [SCRIPT, "replay", str(folder / "samples.json"), *faults, "--"]
    return torchrun(size, [*command, *arguments(folder, "--run.dir", name, *others)], folder, options=logs)


def logs(folder: Path, name: str, attempt: int = 0) -> list[str]:
    """What every rank printed, by rank."""
    (attempts,) = (folder / f"logs-{name}").glob(f"*/attempt_{attempt}")
    return [
        "".join((place / f"{stream}.log").read_text(errors="replace") for stream in ("stdout", "stderr"))
        for place in sorted(attempts.iterdir(), key=lambda place: place.name)
        if place.is_dir()
    ]


def told(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("gadcore: ")]


FAULTS = [
    ("rollout", 3, "SIGKILL"), ("update", 5, "SIGKILL"), ("checkpoint", 6, "SIGKILL"),
    ("rollout", 6, "hang"), ("update", 3, "hang"), ("checkpoint", 8, "hang"), ("rollout", 4, "SIGSTOP"),
]  # fmt: skip


@pytest.mark.parametrize(("moment", "count", "how"), FAULTS)
def test_a_failed_process_ends_the_job_and_the_run_goes_on_to_the_bit(two: Path, moment, count, how) -> None:
    name = f"{moment}-{how}"
    failed = launched(
        two, 2, name, "--distributed.timeout_s", str(TIMEOUT), faults=[f"1:{moment}:{count}:{how}"],
        options=["--shutdown-timeout", "5"],
    )  # fmt: skip
    ended = time.time()
    assert failed.returncode == 1, failed.stderr
    printed = logs(two, name)
    began = float(re.search(r"fault at ([\d.]+)", printed[1])[1])
    print(f"\n{name}: the job ended {ended - began:.1f} s after the fault")
    for rank, text in enumerate(printed):
        print(*(f"  rank {rank}: {line}" for line in told(text)), sep="\n")
    # Generous: two cores may have other work.
    assert ended - began < (30 if how == "SIGKILL" else TIMEOUT + 60)
    places = [line for line in told(printed[0]) if re.match(r"gadcore: rank \d \(", line)]
    assert len(places) == 2 and all(", step " in line for line in places)
    assert ("does not answer" in places[1]) == (how != "hang")
    left = store.latest(two / name / "checkpoints")
    print("  left:", *sorted(path.name for path in (two / name / "checkpoints").glob("*")))
    if moment == "checkpoint":
        # Each writes five files a checkpoint: the fault is in the second one, the first is whole.
        assert left is not None and left.name == "step-000002" and store.load(left).ranks == 2
    finished(resumed(two, 2, name))
    assert_same_run(two / name, two / "two")


def test_torchrun_restarts_a_job_that_goes_on(two: Path) -> None:
    done = launched(two, 2, "restarted", faults=["1:update:6:SIGKILL"], options=["--max-restarts", "2"])
    assert done.returncode == 0, done.stderr
    assert "resumed: after step" in logs(two, "restarted", 1)[0]
    assert_same_run(two / "restarted", two / "two")


def test_hsdp_trains_what_one_process_does_and_goes_on_to_the_bit(two: Path) -> None:
    mesh = ("--distributed.replicate", "2")
    finished(replayed(two, 4, "hsdp", *mesh))
    assert_alike(two / "hsdp", two / "one", rel=1e-5)
    facts = json.loads((two / "hsdp/summary.json").read_text())["distributed"]
    assert (facts["shard"], facts["replicate"]) == (2, 2)
    job = replayed(two, 4, "hsdp-stopped", *mesh, "--memory.offload", "file")
    metrics = two / "hsdp-stopped/metrics.jsonl"
    while job.processes[0].poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 5):
        time.sleep(0.05)
    job.signal(3, signal.SIGTERM)
    assert job.wait(120) == [143] * 4, job.output(0)
    finished(resumed(two, 4, "hsdp-stopped"))
    assert_same_run(two / "hsdp-stopped", two / "hsdp")


def test_a_checkpoint_of_four_is_resumed_by_two_and_by_one_and_exported(two: Path) -> None:
    finished(replayed(two, 4, "four"))
    assert_alike(two / "four", two / "one", rel=1e-5)
    kept = two / "four/checkpoints/step-000006"
    names = {f"student-0000{rank}-of-00004.safetensors" for rank in range(1, 5)}
    assert {path.name for path in kept.glob("student-0*")} == names
    for size in (2, 1):
        shutil.copytree(two / "four", two / f"four-{size}")
        name, back = f"four-{size}", ("--resume", "step-000006")
        if size > 1:
            text = finished(resumed(two, size, name, *back))
        else:
            command = [sys.executable, SCRIPT, "replay", str(two / "samples.json"), "--"]
            done = run(["--run.dir", name, *back], two, command=command)
            assert done.returncode == 0, done.stderr
            text = done.stdout
        assert "the checkpoint is one of 4 processes, the run goes on with" in text
        assert_alike(two / name, two / "one", rel=1e-5)
    for which, auto in (("student", AutoModelForCausalLM), ("discriminator", AutoModelForSequenceClassification)):
        done = run(["export", "four", "--out", f"out-{which}", "--model", which], two)
        assert done.returncode == 0, done.stderr
        ours, theirs = (load_file(two / place / "model.safetensors") for place in (f"out-{which}", f"four/{which}"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
        _, info = auto.from_pretrained(two / f"out-{which}", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info


PROMPTS = [[1 + 7 * i % 200 for i in range(3 + 5 * k)] for k in range(4)]
GREEDY = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=96, block_size=32)
parameters = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
drawn = llm.generate([{"prompt_token_ids": p} for p in json.loads(sys.argv[2])], parameters, use_tqdm=False)
print("tokens", json.dumps([list(one.outputs[0].token_ids) for one in drawn]))
"""


def test_an_export_of_four_is_what_vllm_and_transformers_sample_from(two: Path) -> None:
    pytest.importorskip("vllm")
    if not (two / "four").exists():
        finished(replayed(two, 4, "four"))
    done = run(["export", "four", "--out", "out-vllm"], two)
    assert done.returncode == 0, done.stderr
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    variables |= {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-c", GREEDY, str(two / "out-vllm"), json.dumps(PROMPTS)]
    drawn = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=900)
    (line,) = [line for line in drawn.stdout.splitlines() if line.startswith("tokens ")] or [drawn.stderr[-3000:]]
    model = AutoModelForCausalLM.from_pretrained(two / "out-vllm", dtype=torch.float32)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(16):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        expected.append(ids[0, len(prompt) :].tolist())
    assert json.loads(line.removeprefix("tokens ")) == expected


def test_two_processes_that_sample_ahead_go_on_to_the_bit(two: Path) -> None:
    """With a batch on its way that every process has drawn."""
    how = ["--rollout.ahead", "1", "--rollout.ahead_by_turns", "true", "--algorithm.importance_cap", "2"]
    for name in ("ahead", "ahead-stopped"):
        command = ["-m", "gadcore.run", *arguments(two, "--run.dir", name, *how)]
        job = start_job(2, command, two / f"out-{name}", cwd=two)
        if name == "ahead":
            finished(job)
            continue
        metrics = two / name / "metrics.jsonl"
        while job.processes[0].poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 5):
            time.sleep(0.05)
        job.signal(1, signal.SIGTERM)
        assert job.wait(120) == [143] * 2, job.output(0)
    assert list((two / "ahead-stopped/checkpoints").glob("*/ahead-*.safetensors"))
    command = ["-m", "gadcore.run", "--run.dir", "ahead-stopped", "--resume", "auto"]
    finished(start_job(2, command, two / "out-ahead-again", cwd=two))
    assert_same_run(two / "ahead-stopped", two / "ahead")
    assert [row["sampler/staleness"] for row in records(two / "ahead")] == [0, 1, 1, 0, 1, 1, 1]


def test_fewer_prompts_than_processes(two: Path) -> None:
    """Some have no work in a step: it is said, and the run is the same."""
    small = ("--schedule.batch_size", "1", "--schedule.warmup_steps", "2", "--schedule.gad_steps", "2")
    command = [sys.executable, SCRIPT, "record", str(two / "small.json"), "--"]
    done = run(arguments(two, "--run.dir", "small-one", *small), two, command=command)
    assert done.returncode == 0, done.stderr
    script = [SCRIPT, "replay", str(two / "small.json"), "--"]
    done = torchrun(3, [*script, *arguments(two, "--run.dir", "small-three", *small)], two)
    assert done.returncode == 0, done.stderr
    assert "schedule.batch_size = 1 prompts are fewer than the 3 processes" in done.stdout
    assert_alike(two / "small-three", two / "small-one", rel=1e-5)
