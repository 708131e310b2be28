"""Runs on a real teacher's text, compared over the seconds that they have trained.

A point is a checkpoint of a run; the model that all of them started from is the first one. What is measured of each is
what `python -m gadcore.run eval` measures: one response per held-out prompt, the measures of text, and the test by a
fresh discriminator. Responses and tests are kept in a folder, so a measurement that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import options
from gadcore.checkpoint import store
from gadcore.config import loading
from gadcore.config.data import SPLIT
from gadcore.config.settings import Config
from gadcore.errors import UserError
from gadcore.evaluate.measure import TEACHER, Results, values_of
from gadcore.evaluate.responses import read_responses
from gadcore.evaluate.settings import EvalConfig
from gadcore.evaluate.table import NAME
from gadcore.measure.intervals import difference
from gadcore.memory.holdings import WORK_OF
from gadcore.record.reading import read_json
from gadcore.rollout.engine import engine_class

Row = dict[str, Any]

START = "start"
SET = "held_out"
# What training is, for the comparison at equal compute: no loading, no evaluation, no saving.
PHASES = tuple(f"time/{phase}" for phase in ("rollout", *WORK_OF["discriminator"], *WORK_OF["student"]))
WORK = Path("runs/real")
# As fast as the discriminator that trains beside the student.
FRESH = {"fresh.steps": 16, "fresh.batch_size": 8, "fresh.lr": 3e-5}
QUICK = {"eval.rows": 4, "eval.resamples": 50, "fresh.steps": 2, "fresh.batch_size": 2}
SHARED = ("student.model", "data.eval", "data.columns", "data.system_prompt", "data.max_prompt_tokens",
          "data.max_response_tokens", "schedule.batch_size")  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A checkpoint of a run. seconds: of training up to it, wall time."""

    run: str
    step: int
    stage: str
    seconds: float
    path: Path

    @property
    def name(self) -> str:
        return f"{self.run}-{self.step:06d}"


@dataclass(frozen=True)
class Run:
    """A run folder. name: gad or seqkd. lasted: steps by stage, as far as it has come. points: by rising step."""

    name: str
    config: Config
    lasted: dict[str, int]
    points: list[Point]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "The other settings are those of python -m gadcore.run eval."
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN", help="run folders, the one of GAD first")
    parser.add_argument("--steps", type=options.numbers, default=(), help="checkpoints of the first run, default all")


def run(
    folders: Sequence[Path], quick: bool = False, steps: Sequence[int] = (), settings: Sequence[str] = ()
) -> list[Row]:
    """A row per point of the runs, the start model's first.

    Of the first run the checkpoints of `steps` are measured (none given: all), of the others those that are the nearest
    to one of these in seconds of training. settings: of `eval`, as on its command line; they replace those of the first
    run and FRESH. quick: few rows and steps, for tests; its results say nothing.

    Raises UserError where a folder is no run with checkpoints and held-out rows, or where the runs differ in what a
    comparison needs to be the same; RuntimeError where the evaluation failed or was stopped.
    """
    runs = [read(folder) for folder in folders]
    if unknown := sorted(set(steps) - {point.step for point in runs[0].points}):
        there = ", ".join(str(point.step) for point in runs[0].points)
        raise UserError(f"{folders[0]} has no checkpoint of step {unknown[0]}: there are {there}")
    names = [each.name for each in runs]
    if len(set(names)) < len(names):
        raise UserError(f"the runs must be of different methods, these are {', '.join(names)}")
    first, *others = runs
    for other, folder in zip(others, folders[1:], strict=True):
        check_same(first.config, other.config, folder)
    mine = [point for point in first.points if not steps or point.step in steps]
    matched = {other.name: [nearest(point, other.points) for point in mine] for other in others}
    chosen = [*mine, *(p for other in others for p in other.points if p in matched[other.name])]
    given = [*evaluation_of(first.config, chosen, quick), *settings]
    config = loading.load(given, EvalConfig)
    # In a process of its own: the number of threads must be known before torch is loaded.
    done = subprocess.run([sys.executable, "-m", "gadcore.run", "eval", *given])
    if done.returncode:
        raise RuntimeError(f"the evaluation ended with exit code {done.returncode}; the same command goes on")
    folder = Path(config.eval.out)
    found = read_json(folder / f"{NAME}.json")["sets"][SET]
    values = {point.name: _values(folder / SET, point.name) for point in chosen}
    rows: list[Row] = [{"run": START, "step": 0, "seconds": 0.0, "measures": found["results"][START]}]
    rows[0]["teacher"] = found["results"][TEACHER]
    rows += [_row(point, found["results"][point.name]) for point in chosen]
    for i, point in enumerate(mine):
        rows[1 + i]["beside"] = {
            name: _difference(points[i], values[points[i].name], values[point.name], config.eval.resamples)
            for name, points in matched.items()
        }
    about = {"prompts": found["prompts"], "settings": _told(config)}
    training = {each.name: _training(each) for each in runs}
    return [{"experiment": "real", **row, **about, "training": training.get(row["run"], {})} for row in rows]


def read(folder: Path) -> Run:
    """A run with its checkpoints. Raises UserError where it has none, or no held-out rows."""
    if not (folder / "config.toml").is_file() or not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} is no run folder: it lacks config.toml or metrics.jsonl")
    config = loading.load(["--config", str(folder / "config.toml")])
    if config.data.eval in (None, SPLIT):
        raise UserError(f"the run {folder} names no held-out rows (data.eval): there is nothing to compare on")
    saved = store.available(folder / "checkpoints")
    if not saved:
        raise UserError(f"{folder} has no checkpoints: train with checkpoint.every, and checkpoint.keep large")
    done = trained(folder)
    name = "seqkd" if any(stage == "seqkd" for stage, _ in done.values()) else "gad"
    points = [Point(name, step, *done[step], path) for step, path in saved.items() if step in done]
    return Run(name, config, dict(Counter(stage for stage, _ in done.values())), points)


def trained(folder: Path) -> dict[int, tuple[str, float]]:
    """By step of a run, its stage and the seconds of training up to it."""
    # A step that is being written may stand there without its end.
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    seconds, found = 0.0, {}
    for row in map(json.loads, lines):
        seconds += sum(row.get(phase, 0.0) for phase in PHASES)
        found[row["step"]] = (row["stage"], seconds)
    return found


def nearest(point: Point, points: Sequence[Point]) -> Point:
    """The one with the most nearly equal seconds of training."""
    return min(points, key=lambda other: abs(other.seconds - point.seconds))


def check_same(first: Config, other: Config, folder: Path) -> None:
    """UserError where two runs differ in a setting of SHARED."""
    for key in SHARED:
        section, _, name = key.partition(".")
        mine, theirs = (getattr(getattr(config, section), name) for config in (first, other))
        if mine != theirs:
            raise UserError(
                f"{key} is {mine!r} in the first run and {theirs!r} in {folder}: compare runs with one value"
            )


def evaluation_of(config: Config, points: Sequence[Point], quick: bool) -> list[str]:
    """Arguments of `eval`: limits, machine and sampler as in the run's own held-out evaluation."""
    models = {START: config.student.model, **{point.name: str(point.path) for point in points}}
    held = {"source": config.data.eval, "columns": config.data.columns}
    flat: dict[str, Any] = {
        "eval.models": _toml(models),
        "eval.in_domain": f"{{{SET} = {_toml(held)}}}",
        "eval.rows": config.data.eval_rows,
        "eval.out": str(WORK),
        "run.device": config.run.device,
        "run.threads": config.run.threads,
        "data.system_prompt": config.data.system_prompt,
        "data.max_prompt_tokens": config.data.max_prompt_tokens,
        "data.max_response_tokens": config.data.max_response_tokens,
        "sampling.engine": config.rollout.engine,
        "sampling.dtype": engine_class(config).dtype(config),
        "sampling.temperature": config.rollout.temperature,
        **({"sampling.kv_cache_gib": config.vllm.kv_cache_gib} if config.rollout.engine == "vllm" else {}),
        "fresh.micro_batch_tokens": config.schedule.micro_batch_tokens,
        **FRESH,
        **(QUICK if quick else {}),
    }
    return [f"--{key}={'none' if value is None else value}" for key, value in flat.items()]


def _toml(table: dict[str, Any]) -> str:
    pairs = (f"{json.dumps(k)} = {_toml(v) if isinstance(v, dict) else json.dumps(v)}" for k, v in table.items())
    return f"{{{', '.join(pairs)}}}"


def _values(folder: Path, model: str) -> dict[str, list[float]]:
    """Every measure of a model's responses, a value per prompt."""
    values = values_of(read_responses(folder / f"{model}.jsonl"))
    kept = folder / f"fresh-{model}.json"
    return values | ({"fresh_accuracy": read_json(kept)["correct"]} if kept.is_file() else {})


def _difference(other: Point, theirs: dict[str, Any], mine: dict[str, Any], resamples: int) -> Row:
    """A point of the first run minus the one of another run beside it, paired by prompt."""
    found = {name: difference(theirs[name], mine[name], resamples=resamples).as_dict() for name in mine}
    return {"step": other.step, "seconds": other.seconds, "differences": found}


def _row(point: Point, measures: Results) -> Row:
    return {
        "run": point.run,
        "step": point.step,
        "stage": point.stage,
        "seconds": point.seconds,
        "measures": measures,
    }


def _told(config: EvalConfig) -> Row:
    """What the figures depend on; no names of files, which mean nothing elsewhere."""
    fresh = config.fresh.model_dump(include={"steps", "batch_size", "lr", "cross_fit", "grad_clip", "seed"})
    limits = config.data.model_dump(include={"max_prompt_tokens", "max_response_tokens"})
    return {"fresh": fresh, **limits, "temperature": config.sampling.temperature, "seed": config.run.seed}


def _training(run: Run) -> Row:
    config = run.config
    return {
        "steps": run.lasted,
        "student": Path(config.student.model).name,
        "batch_size": config.schedule.batch_size,
        "group_size": config.rollout.group_size,
        "threads": config.run.threads,
        **{name: getattr(config.student, name) for name in ("lr", "warmup_lr", "seqkd_lr")},
        "discriminator_lr": config.discriminator.lr,
    }
