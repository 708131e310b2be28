"""One run of a method and what is measured of its student, by gadcore's own commands in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.methods import data
from bench.paper.real import START, trained
from gadcore.evaluate.measure import teacher_values, values_of
from gadcore.evaluate.responses import by_prompt, read_responses
from gadcore.files import write_whole
from gadcore.record.reading import read_json

TEACHER = "teacher"
# Of all that is measured, what is kept, a value a prompt.
MEASURES = ("style", "word_range", "repetition", "distinct_2", "rouge_l", "ngram_f1_4", "words", "cut_share")
Values = dict[str, list[float]]


@dataclass(frozen=True)
class Place:
    """Where a data set's models, rows and responses are. settings: what the user gave beside, for gadcore.run.

    evaluation: settings of `eval` beside those that follow from the run.
    """

    folder: Path
    name: str
    student: str
    discriminator: str
    threads: int
    settings: Sequence[str]
    evaluation: Mapping[str, Any]

    @property
    def start(self) -> str:
        return str(Path(self.student).absolute()) if Path(self.student).is_dir() else self.student

    def rows(self, name: str) -> Path:
        return self.folder / "rows" / f"{name}.jsonl"


def arguments(settings: Mapping[str, Any]) -> list[str]:
    """As on a command line."""
    return [f"--{key}={_told(value)}" for key, value in settings.items()]


def _told(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def train(place: Place, name: str, command: str, settings: Mapping[str, Any], seed: int) -> Path:
    """The folder of a finished run; one that was stopped goes on. RuntimeError where the command fails."""
    folder = place.folder / "trained" / name
    own: dict[str, Any] = {
        "run.dir": str(folder),
        "run.seed": seed,
        "run.threads": place.threads,
        "data.train": str(place.rows(data.TRAIN)),
        "data.eval": None,
        "student.model": place.start,
        "checkpoint.every": 50,
        "checkpoint.keep": 1,
        "tracking.sample_every": 0,
        "tracking.view": "plain",
        **({"discriminator.model": place.discriminator} if command == "" else {}),
    }
    # Without a file the default job's preset would lie below, which is tuned for another purpose, and changes.
    defaults = place.folder / "defaults.toml"
    write_whole(defaults, "# Nothing: what is not on the command line has gadcore's defaults.\n")
    given = [f"--config={defaults}", *arguments({**settings, **own}), *place.settings]
    if (folder / "config.toml").is_file():
        given.append("--run.resume=auto")
    _run([*([command] if command else []), *given], f"training {name}")
    return folder


def seconds_of(folder: Path) -> dict[str, float]:
    """Seconds of training by stage: sampling, discriminator and student, no loading and no saving."""
    found: dict[str, float] = {}
    before = 0.0
    for stage, seconds in trained(folder).values():
        found[stage] = found.get(stage, 0.0) + seconds - before
        before = seconds
    return found


def steps_of(folder: Path) -> dict[str, int]:
    return dict(Counter(stage for stage, _ in trained(folder).values()))


def measure(
    place: Place, name: str, folder: Path | None, limits: Mapping[str, Any], samples: int, fresh: bool
) -> dict[str, Values]:
    """By set, what is measured of a run's student, a value a prompt. folder: of the run; None: the start model.

    limits: settings of the data set. RuntimeError where the command fails.
    """
    out = place.folder / "measured"
    models = {START: place.start, **({name: str(folder)} if folder else {})}
    sets = {each: str(place.rows(each)) for each in data.SETS}
    settings: dict[str, Any] = {
        "eval.models": toml_table(models),
        "eval.in_domain": toml_table({data.HELD_OUT: sets[data.HELD_OUT]}),
        "eval.out_of_domain": toml_table({data.ELSEWHERE: sets[data.ELSEWHERE]}),
        "eval.samples": samples,
        "eval.out": str(out),
        "eval.resamples": 10,
        "run.threads": place.threads,
        "sampling.engine": limits["rollout.engine"],
        "sampling.temperature": limits["rollout.temperature"],
        "data.max_prompt_tokens": limits["data.max_prompt_tokens"],
        "data.max_response_tokens": limits["data.max_response_tokens"],
        "fresh.enabled": fresh,
        **place.evaluation,
    }
    _run(["eval", *arguments(settings)], f"measuring {name}")
    return {each: _values(out / each, name, place.name, fresh) for each in data.SETS}


def taught(place: Place) -> dict[str, Values]:
    """What the start model's responses were held against: the teacher's own figures, by set."""
    found = {each: read_responses(place.folder / "measured" / each / f"{START}.jsonl") for each in data.SETS}
    return {each: {k: v for k, v in teacher_values(rows).items() if k in MEASURES} for each, rows in found.items()}


def _values(folder: Path, name: str, data_set: str, fresh: bool) -> Values:
    rows = read_responses(folder / f"{name}.jsonl")
    values = {key: column for key, column in values_of(rows).items() if key in MEASURES}
    if data_set in data.DESIGNS:
        values["right"] = by_prompt(rows, [data.right(data_set, r.prompt, r.response, r.finished) for r in rows])
    if fresh:
        values["fresh_accuracy"] = list(map(float, read_json(folder / f"fresh-{name}.json")["correct"]))
    return values


def toml_table(table: Mapping[str, str]) -> str:
    """As a setting on the command line."""
    return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + "}"


def _run(given: Sequence[str], what: str) -> None:
    # In a process of its own: threads must be known before torch is loaded.
    done = subprocess.run([sys.executable, "-m", "gadcore.run", *given])
    if done.returncode:
        raise RuntimeError(f"{what} ended with exit code {done.returncode}; the same command goes on")
