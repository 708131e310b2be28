"""The default job with all of the student's weights trained and with adapters: what is measured after each stage.

After its cross-entropy the student is one of SeqKD, after its GAD stage one of GAD, so a run says both. With --rates
the cross-entropy alone is run at several learning rates, on a seed of its own. A run that is there is read, one that
was stopped goes on.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import options
from bench.default import suite as default_job
from bench.methods.suite import written
from gadcore.errors import UserError
from gadcore.measure.figures import MEASURES
from gadcore.record.tracking import Row
from gadcore.report import files
from gadcore.report.findings import values_of

WORK = Path("runs/learning")
SEEDS = 3
RATES_SEED = 10
# With a look at the held-out rows' own every 20 steps; what is sampled in the end is measured for nothing.
CROSS_ENTROPY_ALONE = (
    "--schedule.warmup_steps=0",
    "--schedule.gad_steps=0",
    "--curriculum.every=20",
    "--curriculum.rows=60",
    "--data.eval_samples=1",
)
LOOK = "heldout/ce"
# Steps at the end of GAD over which the distance to the policy before it is averaged.
LAST = 4
# Of the run's evaluations, those of a student that one of the methods has made.
STAGES = ("before", "after_sft", "after_gad")
# By what the rows call them, the measures' paths in an evaluation.
PATHS = {
    "style": ("style",),
    "word_range": ("word_range",),
    "rouge_l": ("rouge_l",),
    "ngram_f1_4": ("ngram_f1", "4"),
    "repeated": ("repeated",),
    "cut_share": ("cut_share",),
    "words": ("words",),
    "distinct_2": ("distinct_2",),
}


@dataclass(frozen=True)
class Side:
    """settings: beside those of the default job. rate: learning rate of the cross-entropy, the best of `rates` by the
    held-out rows' own after its 80 steps, on RATES_SEED. That of GAD is a fifth of it, as in the default job."""

    says: str
    settings: Sequence[str]
    rate: str
    rates: Sequence[str]

    def given(self, rate: str) -> list[str]:
        return [*self.settings, f"--student.warmup_lr={rate}"]


ALL_WEIGHTS = "full"
SIDES = {
    ALL_WEIGHTS: Side(
        "all weights of student and discriminator",
        ("--student.adapter=none", "--student.lr=1e-5"),
        "5e-5",
        ("2.5e-5", "5e-5", "1e-4"),
    ),
    "r16": Side("the student by adapters of rank 16, as the default job is", (), "5e-4", ("2.5e-4", "5e-4", "1e-3")),
    "r64": Side(
        "the student by adapters of rank 64",
        ("--student.adapter_rank=64", "--student.lr=2.5e-5"),
        "1.25e-4",
        ("1.25e-4", "2.5e-4", "5e-4"),
    ),
    "r16-both": Side(
        "student and discriminator by adapters of rank 16 on one base",
        ("--discriminator.adapter=lora", "--discriminator.lr=5e-4"),
        "5e-4",
        (),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Other settings are those of python -m gadcore.run, for every side."
    parser.add_argument("--sides", type=options.names, default=tuple(SIDES), help=f"default {','.join(SIDES)}")
    parser.add_argument("--seeds", type=options.count, default=SEEDS, help=f"how many, default {SEEDS}")
    parser.add_argument("--first", type=options.seed, default=0, help="the first seed, default 0")
    parser.add_argument("--rates", action="store_true", help=f"learning rates instead, on seed {RATES_SEED}")
    parser.add_argument("--work", type=Path, default=WORK, help=f"where runs and rows are, default {WORK}")


def key(row: Row) -> tuple[Any, ...]:
    """What a row is a result of: a newer one takes its place."""
    return row["method"], row["seed"], row.get("rate")


def run(
    quick: bool,
    sides: Sequence[str] = tuple(SIDES),
    seeds: int = SEEDS,
    first: int = 0,
    rates: bool = False,
    work: Path = WORK,
    settings: Sequence[str] = (),
) -> Iterator[Row]:
    """A row for every seed from `first` on and every side, as soon as it is there; with `rates` one for every side and
    learning rate.

    quick: one seed and a few steps, whose results say nothing. Raises UserError for a side that there is not, or a run
    of other settings in a folder; RuntimeError where a run ends with an error.
    """
    if unknown := [name for name in sides if name not in SIDES]:
        raise UserError(f"no side {unknown[0]}: there are {', '.join(SIDES)}")
    small = [f"--{name}={value}" for name, value in default_job.QUICK.items() if quick]
    where = work.absolute() / ("quick" if quick else "")
    if rates:
        for name in sides:
            side = SIDES[name]
            for rate in side.rates:
                given = [*small, *CROSS_ENTROPY_ALONE, *side.given(rate), *settings]
                yield rate_of(where / f"{name}-{rate}", name, rate, given)
        return
    for seed in range(first, first + (1 if quick else seeds)):
        for name in sides:
            side = SIDES[name]
            yield row_of(where / f"{name}-{seed}", name, seed, [*small, *side.given(side.rate), *settings])


def row_of(folder: Path, side: str, seed: int, settings: Sequence[str]) -> Row:
    """The row of the run in a folder, which is made or finished where need be. kl: nats a token from the policy that
    GAD began with."""
    default_job.train(folder, seed, settings)
    read = files.load(folder)
    if read.summary is None or not all(stage in read.evaluations for stage in STAGES):
        raise UserError(f"{folder} holds no finished run with evaluations: delete it, and it is made again")
    _let_go(folder)
    return {
        "method": side,
        "seed": seed,
        "settings": list(settings),
        "sets": {stage: _columns(read.evaluations[stage]) for stage in STAGES},
        "kl": fmean([row["student/kl"] for row in read.metrics if row["stage"] == "gad"][-LAST:]),
        "seconds": read.summary["seconds"],
        "threads": (read.summary.get("machine") or {}).get("threads"),
    }


def rate_of(folder: Path, side: str, rate: str, settings: Sequence[str]) -> Row:
    """The row of a side's cross-entropy at a learning rate: of the held-out rows, by the step of the look."""
    default_job.train(folder, RATES_SEED, settings)
    looks = {str(row["step"]): round(row[LOOK], 4) for row in files.load(folder).metrics if LOOK in row}
    if not looks:
        raise UserError(
            f"the run in {folder} never looked at held-out rows: give a --curriculum.every within its steps"
        )
    _let_go(folder)
    return {"method": side, "seed": RATES_SEED, "rate": rate, "settings": list(settings), "ce": looks}


def _let_go(folder: Path) -> None:
    """Gigabytes of weights and moments; what was measured of them is kept."""
    for part in ("student", "discriminator", "checkpoints", "reference"):
        shutil.rmtree(folder / part, ignore_errors=True)


def _columns(rows: Sequence[Row]) -> dict[str, str]:
    """A line a measure, a value a prompt; none of a measure that a row lacks."""
    by_path = {measure.path: measure for measure in MEASURES}
    found = {name: values_of(by_path[path], rows) for name, path in PATHS.items()}
    return written({name: values for name, values in found.items() if values is not None})
