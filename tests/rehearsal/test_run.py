"""Whole runs on the stand-in GPU, from the command line to the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from bench.offline import vllm_standin
from bench.offline.cuda_standin import gpu
from gadcore.memory.colocation import Colocation
from gadcore.memory.ledger import ALLOCATOR
from gadcore.run import main
from tests.support.runs import ANSWERS, JOINT_WARMUP, PROMPTS, assert_same_run, records
from tests.support.tiny import save_tiny

GIB, MIB = 1 << 30, 1 << 20
STATES = ("synchronise", "rollout", "discriminator", "discriminator_update", "reference", "student", "student_update")


def arguments(folder: Path, **more: object) -> list[str]:
    model, data = folder / "model", folder / "rows.jsonl"
    if not model.exists():
        save_tiny(model, head_dim=64)
        rows = [{"prompt": p, "teacher_response": a} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "run.device": "cuda",
        "run.dir": folder / "run",
        "student.model": model,
        "student.autocast": "bfloat16",
        "discriminator.autocast": "bfloat16",
        "rollout.dtype": "bfloat16",
        # Of a GPU that is large for the plan, and of which vLLM takes no more than this machine can spare.
        "rollout.gpu_memory_utilization": 0.002,
        "data.train": data,
        "data.eval": data,
        "data.eval_rows": 2,
        "data.max_prompt_tokens": 64,
        "data.max_response_tokens": 4,
        "rollout.group_size": 2,
        "rollout.block_size": 4,
        "schedule.batch_size": 2,
        **JOINT_WARMUP,
        "schedule.warmup_steps": 1,
        "schedule.gad_steps": 2,
        "schedule.gad_epochs": 2,
        "checkpoint.every": 1,
        "checkpoint.keep": 9,
        "student.lr": 1e-3,
        "student.warmup_lr": 1e-3,
        "discriminator.lr": 1e-3,
        "algorithm.kl_coef": 0.05,
        "tracking.monitor_interval": 0,
        "tracking.sample_every": 1,
    } | {name.replace("__", "."): value for name, value in more.items()}
    return ["--preset", "smollm2-cpu", *(str(item) for k, v in settings.items() for item in (f"--{k}", v))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(the folder of a run that has ended, per state the bytes that its tensors took beside the holdings at most, and
    what the ledger has learned of that)."""
    folder = tmp_path_factory.mktemp("run")
    truth: dict[str, int] = {}
    ledger: dict[str, int] = {}
    observe = Colocation.observe

    def watched(memory: Colocation) -> None:
        state, most = memory.state, torch.cuda.max_memory_allocated()
        observe(memory)
        if state is not None:
            held = memory.ledger.total - memory.ledger.held.get(ALLOCATOR, 0) - memory.ledger.held["process"]
            truth[state] = max(truth.get(state, 0), most - held)
            ledger.update(memory.ledger.work)

    Colocation.observe = watched
    try:
        with gpu(80 * GIB, context=512 * MIB) as device, vllm_standin.installed():
            assert main(arguments(folder)) == 0
            left = device.allocator.allocated
    finally:
        Colocation.observe = observe
    return folder, truth, ledger, left


def test_a_run_ends_as_on_a_cpu(finished) -> None:
    folder = finished[0] / "run"
    rows = records(folder)
    assert [row["stage"] for row in rows] == ["warmup", "gad", "gad"]
    # The sampler computes in bfloat16 what the trainer computes under autocast.
    assert all(0 < row["sampler/logprob_diff_mean"] < 0.1 for row in rows[1:])
    assert rows[2]["student/kl"] > rows[1]["student/kl"] == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["memory"]["offload"] == "pinned" and not summary["memory"]["shared_weights"]
    for name in ("report.html", "student/model.safetensors", "discriminator/model.safetensors"):
        assert (folder / name).is_file()


def test_the_ledger_knows_what_states_compute_with(finished) -> None:
    _, truth, ledger, _ = finished
    assert set(STATES) <= truth.keys()
    for state in STATES:
        # What the allocator rounds up and cannot use is counted as well: a segment of each size.
        assert truth[state] <= ledger[state] <= truth[state] + 44 * MIB


def test_everything_is_given_back(finished) -> None:
    assert finished[3] < 4 * MIB


def test_a_resumed_run_is_the_same_to_the_bit(finished, tmp_path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(finished[0], folder)
    ours = folder / "run"
    for name in ("student", "discriminator", "checkpoints/step-000003"):
        shutil.rmtree(ours / name)
    (ours / "summary.json").unlink()
    with gpu(80 * GIB, context=512 * MIB), vllm_standin.installed():
        assert main(["--run.dir", str(ours), "--resume", "step-000002"]) == 0
    assert_same_run(ours, finished[0] / "run")
