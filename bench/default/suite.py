"""The default job as it is, a run for every seed: what its report says, what each stage changed, and how long it took.

Runs are those of `make run ARGS="--run.seed N --run.dir WORK/seed-N"`, but for their checkpoints. One that is there and
finished is read and not made again; one that was stopped goes on. As a control the student that GAD began with is
sampled again at a higher temperature: what that changes too is no gain of GAD's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import options, record
from bench.default.control import control
from gadcore.errors import UserError
from gadcore.files import write_whole
from gadcore.measure.figures import MEASURES
from gadcore.report import files, findings
from gadcore.report.parts import figures_of

Row = dict[str, Any]
PRESET = "smollm2-cpu"
WORK = Path("runs/default")
SEEDS = 3
QUICK = {
    "data.eval_rows": 4, "data.eval_samples": 2, "rollout.engine": "hf", "rollout.group_size": 2,
    "schedule.sft_steps": 2, "schedule.warmup_steps": 1, "schedule.gad_steps": 2, "run.threads": 1,
    "data.max_response_tokens": 16,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Other settings are those of python -m gadcore.run, for every seed."
    parser.add_argument("--seeds", type=options.count, default=SEEDS, help=f"how many, default {SEEDS}")
    parser.add_argument(
        "--first", type=options.seed, default=0, help="the first one, default 0; a later one goes on there"
    )
    parser.add_argument("--work", type=Path, default=WORK, help=f"where the runs are, WORK/seed-N, default {WORK}")


def key(row: Row) -> tuple[Any, ...]:
    return (row["seed"],)


def run(
    quick: bool, seeds: int = SEEDS, first: int = 0, work: Path = WORK, settings: Sequence[str] = ()
) -> Iterator[Row]:
    """A row for every seed from `first` on. quick: one seed and a few steps, whose results say nothing.

    Raises RuntimeError where a run ends with an error, UserError where its folder is damaged.
    """
    given = [*(f"--{name}={value}" for name, value in QUICK.items() if quick), *settings]
    for seed in range(first, first + (1 if quick else seeds)):
        folder = work.absolute() / f"seed-{seed}{'-quick' if quick else ''}"
        train(folder, seed, given)
        yield row_of(folder, seed)


def train(folder: Path, seed: int, settings: Sequence[str]) -> None:
    """Makes the run in its folder, or the rest of it. UserError where a finished one was made with other settings."""
    kept = folder.with_name(f"{folder.name}-settings.json")
    if (folder / "summary.json").is_file():
        # One of `make run` has none but the preset's.
        if list(settings) != (json.loads(kept.read_text()) if kept.is_file() else []):
            raise UserError(f"the run in {folder} was made with other settings: name another --work, or delete it")
        return
    write_whole(kept, json.dumps(list(settings)))
    record.say(f"default: seed {seed}: {folder}")
    command = [sys.executable, "-m", "gadcore.run", f"--preset={PRESET}", f"--run.seed={seed}", f"--run.dir={folder}"]
    # One where each stage ends: the control begins where GAD does.
    command.append("--checkpoint.every=100000")
    if (folder / "config.toml").is_file():
        command.append("--run.resume=auto")
    done = subprocess.run([*command, *settings], cwd=record.ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"the run of seed {seed} ended with exit code {done.returncode}")


def row_of(folder: Path, seed: int) -> Row:
    """Sentences, stages, control and seconds of a finished run. seconds: by phase; "total": from start to end."""
    read = files.load(folder)
    if read.summary is None or not read.evaluations:
        raise UserError(f"{folder} holds no finished run with evaluations: delete it, and it is made again")
    figures = figures_of(read)
    stages = []
    for before, after in pairwise(read.evaluations):
        changes = {}
        for measure in MEASURES:
            found = findings.between(before, after, read.evaluations, measure)
            if found is not None and found.margin is not None:
                changes[measure.label] = {"mean": found.mean, "margin": found.margin, "change": found.change}
        stages.append({"before": before, "after": after, "changes": changes})
    machine, steps = read.summary.get("machine") or {}, read.summary.get("steps") or {}
    return {
        "seed": seed,
        "sentences": findings.verdict(figures, read.evaluations),
        "prompts": len(next(iter(read.evaluations.values()))),
        "evaluations": {name: _means(rows) for name, rows in read.evaluations.items()},
        "stages": stages,
        "control": control(read, sum(count for stage, count in steps.items() if stage != "gad")),
        "steps": steps,
        "seconds": read.summary["seconds"],
        "threads": machine.get("threads"),
    }


def _means(rows: Sequence[Row]) -> dict[str, float]:
    """The mean over prompts of every measure that all rows have."""
    known = {measure.label: findings.values_of(measure, rows) for measure in MEASURES}
    return {label: fmean(values) for label, values in known.items() if values is not None}
