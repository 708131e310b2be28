"""Whole runs of the command line on tiny models, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.tiny import save_tiny

ROOT = Path(__file__).resolve().parents[2]
# Figures that no two runs share: times, and what the machine did meanwhile.
OF_THE_MACHINE = ("time/", "perf/", "machine/", "energy/", "memory/")
PROMPTS = ["Name a city.", "What boils?", "When does water freeze?", "Write an answer.", "Who takes turns?"]
ANSWERS = ["Paris.", "Water boils.", "At zero degrees.", "A short answer.", "The user and the assistant."]

# Over the default job's own order and adapters: both models, with all weights, in one warmup, and one sample each.
JOINT_WARMUP = {
    "schedule.sft_epochs": 0,
    "algorithm.student_warmup": "true",
    "algorithm.length_debias": 0,
    "student.adapter": "none",
    "discriminator.adapter": "none",
    "data.eval_samples": 1,
}


def write_rows(path: Path, repeat: int = 2) -> Path:
    rows = [
        {"prompt": f"{prompt} {k}", "teacher_response": answer}
        for k in range(repeat)
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_arguments(folder: Path, engine: str = "hf") -> list[str]:
    """Settings of a run of 3 + 4 steps that takes seconds; model and data are made in `folder`."""
    model, data = folder / "model", folder / "rows.jsonl"
    if not model.exists():
        save_tiny(model)
        write_rows(data)
    settings = {
        "student.model": model,
        "data.train": data,
        "data.eval": data,
        "data.eval_rows": 4,
        "data.max_prompt_tokens": 96,
        "data.max_response_tokens": 24,
        "rollout.engine": engine,
        "rollout.group_size": 3,
        "schedule.batch_size": 4,
        **JOINT_WARMUP,
        "schedule.warmup_steps": 3,
        "schedule.gad_steps": 4,
        "schedule.gad_epochs": 4,
        "schedule.seqkd_steps": 3,
        "checkpoint.every": 2,
        "checkpoint.keep": 2,
        "student.lr": 1e-3,
        "student.warmup_lr": 1e-3,
        "student.seqkd_lr": 1e-3,
        "discriminator.lr": 1e-3,
        "algorithm.kl_coef": 0.05,
        "tracking.sample_every": 1,
    }
    return ["--preset", "smollm2-cpu", *(str(item) for k, v in settings.items() for item in (f"--{k}", v))]


def run(
    arguments: list[str], cwd: Path, *, command: list[str] | None = None, timeout: float = 560
) -> subprocess.CompletedProcess:
    """python -m gadcore.run (or another command line) in `cwd`; never raises."""
    start = command or [sys.executable, "-m", "gadcore.run"]
    # Threads by the environment: a wrapper around gadcore.run has imported torch before it reads run.threads.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*start, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def records(path: Path) -> list[dict]:
    """metrics.jsonl without what no two runs share."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(OF_THE_MACHINE)} for row in rows]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Two run folders hold the same metrics, samples, evaluations and weights, to the bit."""
    assert records(ours) == records(theirs)
    for name in ("student/model.safetensors", "discriminator/model.safetensors", "samples.jsonl"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    for file in (theirs / "evaluations").iterdir():
        assert (ours / "evaluations" / file.name).read_bytes() == file.read_bytes()
    summaries = [json.loads((path / "summary.json").read_text()) for path in (ours, theirs)]
    assert summaries[0]["evaluations"] == summaries[1]["evaluations"]
    assert summaries[0]["tokens"] == summaries[1]["tokens"]
