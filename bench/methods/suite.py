"""Methods beside each other: rows of every method, budget and seed, for docs/measured/methods.md.

Budgets: "data": every method makes as many steps over the same rows; "seconds": it trains as long as GAD after the
plateau warmup did in the same seed, by more or fewer steps of one stage. Runs that were stopped go on, and rows that
are there are not made again: they lie in --work until their settings change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import options, record
from bench.methods import data, tiny, training
from bench.methods.recipes import MEASURE_OF_TIME, METHODS, QUICK, RECIPES, TINY, Recipe, training_settings
from bench.paper.real import START
from gadcore.errors import UserError
from gadcore.files import write_whole

Row = dict[str, Any]
BUDGETS = ("data", "seconds")
WORK = Path("runs/methods")
SEEDS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    costs = ", ".join(f"{name} {recipe.core_minutes:g}" for name, recipe in RECIPES.items())
    parser.epilog = (
        "Other settings are those of python -m gadcore.run; they replace the recipe's, for every method. Core-minutes "
        f"of a row at equal seconds, about: {costs}; the measuring takes about a third more."
    )
    parser.add_argument("--data", choices=RECIPES, default="house", help="default house")
    parser.add_argument("--methods", type=options.names, default=tuple(METHODS), help=f"default {','.join(METHODS)}")
    parser.add_argument("--budgets", type=options.names, default=BUDGETS, help=f"default {','.join(BUDGETS)}")
    parser.add_argument("--seeds", type=options.count, default=SEEDS, help=f"seeds 0 to N - 1, default {SEEDS}")
    parser.add_argument("--folder", type=Path, help="of --data real: train.jsonl, test.jsonl, ood_vicuna.jsonl")
    parser.add_argument("--work", type=Path, default=WORK, help=f"runs, responses and rows, default {WORK}")
    parser.add_argument("--threads", type=int, default=1, help="of training and sampling, default 1; 0: all")
    parser.add_argument("--fresh", action="store_true", help="measure by fresh discriminators too, minutes a row more")


def run(
    quick: bool,
    data: str = "house",
    methods: Sequence[str] = tuple(METHODS),
    budgets: Sequence[str] = BUDGETS,
    seeds: int = SEEDS,
    folder: Path | None = None,
    work: Path = WORK,
    threads: int = 1,
    fresh: bool = False,
    settings: Sequence[str] = (),
) -> Iterator[Row]:
    """A row for the start model, then one for each seed, method and budget, as soon as it is there.

    quick: random models, a few steps and rows, one seed; for tests, its results say nothing.
    Raises UserError for a method or budget that there is not, and for rows that are missing; RuntimeError where a run
    or an evaluation failed or was stopped.
    """
    for name, there, what in (*((m, METHODS, "method") for m in methods), *((b, BUDGETS, "budget") for b in budgets)):
        if name not in there:
            raise UserError(f"no {what} {name}: there are {', '.join(there)}")
    comparison = Comparison(data, quick, folder, work, threads, fresh, settings)
    yield comparison.start()
    # Seconds are held against that method's, so it comes first.
    ordered = sorted(methods, key=list(METHODS).index)
    for seed in range(1 if quick else seeds):
        for method in ordered:
            for budget in budgets:
                yield comparison.row(method, budget, seed)


class Comparison:
    """A data set with its files and models."""

    def __init__(
        self,
        name: str,
        quick: bool,
        folder: Path | None,
        work: Path,
        threads: int,
        fresh: bool,
        settings: Sequence[str],
    ) -> None:
        self.name, self.fresh = name, fresh
        self.recipe = _quick(name) if quick else RECIPES[name]
        where = work.absolute() / (f"{name}-quick" if quick else name)
        data.write(name, where / "rows", folder, seed=0, rows=6 if quick else None)
        student, discriminator = self.recipe.model, "student"
        if self.recipe.model == TINY:
            words = sorted({word for each in (data.TRAIN, *data.SETS) for word in _words(where / f"rows/{each}.jsonl")})
            window = data.DESIGNS[name].window if name in data.DESIGNS else None
            student = str(tiny.save(where / "models/student", words, 0, window=window))
            discriminator = str(tiny.save(where / "models/discriminator", words, 1, hidden=64, layers=2))
        evaluation = {"fresh.steps": 1, "fresh.batch_size": 2} if quick else {}
        self.place = training.Place(where, name, student, discriminator, threads, settings, evaluation)

    def start(self) -> Row:
        """The row of the model that every method starts from, with the teacher's figures."""
        kept = self._kept(START, {k: v for k, v in self.recipe.settings.items() if k.startswith(("data.", "rollout."))})
        if kept is not None:
            return kept
        sets = training.measure(self.place, START, None, self.recipe.settings, self.recipe.samples, self.fresh)
        teacher = {each: written(values) for each, values in training.taught(self.place).items()}
        return self._keep(START, {"method": START, "budget": "data", "seed": 0, "teacher": teacher}, sets)

    def row(self, method: str, budget: str, seed: int) -> Row:
        """The row of a run, made unless it is kept. GAD after the plateau warmup has one run for both budgets."""
        steps = METHODS[method].steps(self.recipe.lengths)
        if budget == "seconds":
            own = self.row(method, "data", seed)
            if method == MEASURE_OF_TIME:
                return {**own, "budget": budget}
            target = sum(self.row(MEASURE_OF_TIME, "data", seed)["seconds"].values())
            steps = stretched(METHODS[method].stretched, own["steps"], own["seconds"], target)
        name = f"{method}-{budget}-{seed}"
        settings = training_settings(method, self.recipe, steps)
        # How long a run of the same seconds is depends on what the machine did, and is no choice.
        asked = settings if budget == "data" else {k: v for k, v in settings.items() if not k.endswith("_steps")}
        kept = self._kept(name, asked)
        if kept is not None:
            return kept
        record.say(f"methods: {self.name}: {name}, " + ", ".join(f"{n} steps of {stage}" for stage, n in steps.items()))
        folder = training.train(self.place, name, METHODS[method].command, settings, seed)
        seconds = training.seconds_of(folder)
        sets = training.measure(self.place, name, folder, self.recipe.settings, self.recipe.samples, self.fresh)
        facts = {"method": method, "budget": budget, "seed": seed}
        facts |= {"steps": training.steps_of(folder), "seconds": {k: round(v, 2) for k, v in seconds.items()}}
        row = self._keep(name, facts, sets)
        # Gigabytes of weights and moments; what is measured of them is kept.
        for part in ("student", "discriminator", "checkpoints", "reference", "snapshot"):
            shutil.rmtree(folder / part, ignore_errors=True)
        return row

    def _path(self, name: str) -> Path:
        return self.place.folder / "kept" / f"{name}.json"

    def _kept(self, name: str, asked: Mapping[str, Any]) -> Row | None:
        """A row that is there and was made by these settings. One of others is taken away, with its run."""
        told = [self.recipe.model, asked, list(self.place.settings), self.recipe.samples, self.fresh]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        path = self._path(name)
        marker = self.place.folder / "asked" / name
        if not marker.is_file() or marker.read_text(encoding="utf-8") != digest:
            path.unlink(missing_ok=True)
            shutil.rmtree(self.place.folder / "trained" / name, ignore_errors=True)
            for each in data.SETS:
                for file in (self.place.folder / "measured" / each).glob(f"*{name}.json*"):
                    file.unlink()
            write_whole(marker, digest)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def _keep(self, name: str, facts: Row, sets: Mapping[str, training.Values]) -> Row:
        row = {"experiment": "methods", "data": self.name, **facts}
        row |= {"sets": {each: written(values) for each, values in sets.items()}}
        row |= {"threads": self.place.threads, "given": list(self.place.settings)}
        write_whole(self._path(name), json.dumps(row))
        return row


def stretched(stage: str, steps: Mapping[str, int], seconds: Mapping[str, float], target: float) -> dict[str, int]:
    """Steps with which a run lasts `target` seconds that lasted `seconds` by stage with `steps`: those of one stage are
    changed, to one at least."""
    others = sum(value for name, value in seconds.items() if name != stage)
    each = seconds[stage] / steps[stage]
    return {**steps, stage: max(1, round((target - others) / each))}


def key(row: Row) -> tuple[Any, ...]:
    """What a row is a result of: a newer one takes its place."""
    return row["data"], row["method"], row["budget"], row["seed"]


def numbers(text: str) -> list[float]:
    """Values of a column as a row holds them."""
    return [float(value) for value in text.split()]


def written(values: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """Columns as a row holds them, a line each: with a line a number a row would have thousands in a file."""
    return {name: " ".join(f"{value:.4g}" for value in column) for name, column in values.items()}


def _quick(name: str) -> Recipe:
    primary = RECIPES[name].primary
    limits = {"data.max_prompt_tokens": 48, "data.max_response_tokens": 12}
    return replace(QUICK, primary=primary, settings={**QUICK.settings, **limits})


def _words(path: Path) -> set[str]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {word for row in rows for text in (row["prompt"], row["teacher_response"]) for word in text.split()}
