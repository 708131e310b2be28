"""The whole GAD step beside TRL with a discriminator built around it, and beside the paper's literal schedule.

Two processes at a time, ours and the opponent's, take a step in turn, so that a drift of the machine's speed meets
both. Between turns the machine comes to rest: a virtual one gives the memory that a side has freed back to its host,
which slows whatever computes meanwhile. Before any timing, each side's first step on small groups is checked against
fp64.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import options, record
from bench.step.comparison import TOLERANCE, compare, line, within
from bench.step.process import ALONE, LITERAL, OURS, TRL, Worker, environment
from gadcore.errors import UserError

Row = dict[str, Any]
# By side, its answers to the timed steps.
Turns = dict[str, list[dict[str, Any]]]

THREADS = (1, 2)
BUSY = 0.3
# Timed steps after the first one, which is dropped.
STEPS = 3
# Seconds between turns: as long as a virtual machine takes to give gigabytes that a side has freed back to its host.
REST = 20
PROMPTS, SAMPLES = 2, 8

OPPONENTS = (TRL, LITERAL)

REAL = "real"
REAL_MODEL = "smollm2-135m-instruct"
DATA = record.ROOT.parent / "shared" / "data" / "gpt4_concise" / "train.jsonl"
# Padded tokens of a side's pass that fit into memory beside two other processes' models.
PASS_TOKENS = 6144


@dataclass(frozen=True)
class StepCase:
    """A name for --cases, prompt and response tokens (at most, where real), groups a pass."""

    name: str
    prompt: int
    response: int

    @property
    def groups_at_once(self) -> int:
        # The widest pass of any side: the samples of all groups and the teacher's responses, padded.
        fits = PROMPTS * (SAMPLES + 1) * (self.prompt + self.response) <= PASS_TOKENS
        return PROMPTS if fits else 1


CASES = (
    StepCase("64x32", 64, 32),
    StepCase("256x64", 256, 64),
    StepCase("512x128", 512, 128),
    StepCase(REAL, 256, 128),
)
QUICK = StepCase("12x4", 12, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [case.name for case in CASES]
    parser.add_argument("--cases", type=options.names, default=names, help=f"default {','.join(names)}")
    parser.add_argument(
        "--beside", type=options.names, default=OPPONENTS, help=f"opponents, default {','.join(OPPONENTS)}"
    )
    parser.add_argument("--steps", type=options.count, default=STEPS, help=f"timed steps, default {STEPS}")
    parser.add_argument(
        "--native-only", action="store_true", help="leaves out the schedule alone, which takes about as long again"
    )
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("GADCORE_BENCH_DATA", DATA), help=f"rows for the case {REAL}"
    )


def run(
    quick: bool,
    threads: Sequence[int] = THREADS,
    *,
    cases: Sequence[str] = tuple(case.name for case in CASES),
    beside: Sequence[str] = OPPONENTS,
    native_only: bool = False,
    data: Path = DATA,
    steps: int = STEPS,
) -> Iterator[dict[str, Any]]:
    """A row for every case, thread count and opponent, as soon as it is there.

    quick: a tiny model, one thread, one timed step; for tests, its timings say nothing. cases: names of CASES. beside:
    of OPPONENTS. native_only: without the schedule alone. steps: timed ones. data: rows for the case "real". Raises
    UserError for a case or an opponent that there is not and where there are no such rows, RuntimeError where a process
    fails.
    """
    _refuse_unknown("case", cases, [case.name for case in CASES])
    _refuse_unknown("opponent", beside, OPPONENTS)
    chosen = [QUICK] if quick else [case for case in CASES if case.name in cases]
    if any(case.name == REAL for case in chosen) and not data.exists():
        raise UserError(f"{data} is not there: name rows with --data, or leave out the case {REAL} with --cases")
    threads = [1] if quick else [count for count in threads if count <= record.cores()]
    if not quick and (load := os.getloadavg()[0]) > BUSY:
        record.say(f"this machine is busy (load {load:.1f}): the timings will tell less than they could")
    with tempfile.TemporaryDirectory() as folder:
        own = (OURS,) if native_only else (OURS, ALONE)
        measurement = Measurement(Path(folder), quick, data, beside, own, steps)
        # All sides at once would not fit into memory.
        together = [beside] if quick else [[opponent] for opponent in beside]
        for case in chosen:
            for count in threads:
                for some in together:
                    yield from measurement.rows(case, count, some)


def _refuse_unknown(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise UserError(f"no {what} {', '.join(unknown)}: there are {', '.join(known)}")


class Measurement:
    """Problems and gates of a run, made when they are first asked for. own: the sides that are gadcore's."""

    def __init__(
        self,
        folder: Path,
        quick: bool,
        data: Path,
        opponents: Sequence[str],
        own: Sequence[str] = (OURS, ALONE),
        steps: int = STEPS,
    ) -> None:
        self.folder, self.quick, self.data, self.opponents, self.own = folder, quick, data, opponents, own
        self.steps = 1 if quick else steps
        self.samples = 3 if quick else SAMPLES
        self._models: dict[bool, tuple[Path, Path]] = {}
        self._errors: dict[bool, dict[str, dict[str, float]]] = {}

    def rows(self, case: StepCase, threads: int, opponents: Sequence[str]) -> Iterator[dict[str, Any]]:
        if not self.quick:
            self._gate(case)
        problem = self.problem(case, check=self.quick)
        if self.quick:
            answers, profile = self._turns(problem, threads, (*self.own, *opponents), check=True)
            turns = dict.fromkeys(self.own, answers)
            self._errors[False] = self._check(problem, 1)
        else:
            # Each of our sides takes its turns with the opponents by itself: three would not fit into memory.
            found = {side: self._turns(problem, threads, (side, *opponents)) for side in self.own}
            turns, profile = {side: answers for side, (answers, _) in found.items()}, found[OURS][1]
        for opponent in opponents:
            row = self._row(case, problem, threads, opponent, turns) | {"profile": profile}
            record.say(line(row))
            yield row

    def _row(self, case: StepCase, problem: Path, threads: int, opponent: str, turns: dict[str, Turns]) -> Row:
        """turns: by our side, those that it took with the opponent."""
        errors = {side: self._errors[case.name == REAL][side] for side in (*self.own, opponent)}
        compared = {side: compare(turns[side][side], turns[side][opponent], threads) for side in self.own}
        passed = all(within(found) for found in errors.values())
        prompt_tokens = [len(group["prompt_ids"]) for group in json.loads(problem.read_text())["groups"]]
        return {
            "op": "GAD step",
            "impl": "cpu",
            "opponent": opponent,
            "case": case.name,
            "shape": {"P": case.prompt, "R": case.response, "N": self.samples, "B": PROMPTS},
            "dtype": "float32",
            "threads": threads,
            **compared[OURS],
            # The same figures of the other one of our sides.
            "schedule_alone": compared.get(ALONE),
            "gate": "pass" if passed else "fail",
            "tolerance": TOLERANCE,
            "error": errors,
            "config": {
                "model": REAL_MODEL if case.name == REAL else "tiny" if self.quick else "SmolLM2-135M's shape, random",
                "lengths": "as sampled, at most R" if case.name == REAL else "forced",
                "prompt_tokens": prompt_tokens,
                "groups_a_pass": 1 if self.quick else case.groups_at_once,
                "rest_s": 0 if self.quick else REST,
            },
        }

    # -- inputs

    def _models_of(self, case: StepCase) -> tuple[Path, Path]:
        from bench.step import problem
        from gadcore.models.loading import resolve_model

        real = case.name == REAL
        if real not in self._models:
            if real:
                student = resolve_model(REAL_MODEL)
                made = Path(student), problem.discriminator_of(student, self.folder / "real-discriminator")
            else:
                made = problem.random_models(self.folder, problem.TINY if self.quick else problem.SHAPE)
            self._models[real] = made
        return self._models[real]

    def problem(self, case: StepCase, *, check: bool = False) -> Path:
        """check: two ragged groups, small enough for fp64, cut so that sums run over passes."""
        from bench.step.problem import Problem, random_groups, real_groups

        student, discriminator = self._models_of(case)
        path = self.folder / f"{case.name}{'-check' if check else ''}.json"
        prompt, response = (24, 8) if check and not self.quick else (case.prompt, case.response)
        # Beside the timed steps one before them and one for the profile.
        count = PROMPTS * (1 if check and not self.quick else self.steps + 2)
        if case.name == REAL:
            prompt = case.prompt
            groups = real_groups(str(student), self.data, count, prompt, response)
        else:
            lengths = [prompt - 5 * (i % 2) for i in range(count)] if check else [prompt] * count
            groups = random_groups(student, lengths, response)
        Problem(
            str(student),
            str(discriminator),
            groups,
            PROMPTS,
            self.samples,
            prompt,
            response,
            forced=case.name != REAL,
            groups_at_once=1 if check else case.groups_at_once,
        ).write(path)
        return path

    # -- processes

    def _gate(self, case: StepCase) -> None:
        """Errors of every side on the case's models, found once a run."""
        if (case.name == REAL) in self._errors:
            return
        path, threads = self.problem(case, check=True), min(2, record.cores())
        for side in (*self.own, *self.opponents):
            with Worker(side, path, threads, self._findings(side)) as worker:
                worker.ask("check")
        self._errors[case.name == REAL] = self._check(path, threads)

    def _findings(self, side: str) -> Path:
        return self.folder / f"{side}.findings"

    def _check(self, problem: Path, threads: int) -> dict[str, dict[str, float]]:
        """Errors by side of the findings that lie there; a process of its own gives the fp64 models' memory back."""
        sides = [*self.own, *self.opponents]
        paths = [self._findings(side) for side in sides]
        command = [sys.executable, "-m", "bench.step.gate", str(problem), *map(str, paths)]
        done = subprocess.run(command, cwd=record.ROOT, env=environment(threads), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the gate ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
        for path in paths:
            path.unlink()
        return dict(zip(sides, json.loads(done.stdout), strict=True))

    def _turns(
        self, problem: Path, threads: int, names: Sequence[str], *, check: bool = False
    ) -> tuple[Turns, dict[str, Any] | None]:
        """Answers of the timed steps of all sides; our own say the rate of a large product at the time as well.

        The first of `names` is one of our own. On one thread there is a profile of one more step of it. check: the
        first step, which is not timed, leaves findings.
        """
        rest = 0 if check else REST
        answers: Turns = {name: [] for name in names}
        with ExitStack() as stack:
            sides = {name: stack.enter_context(Worker(name, problem, threads, self._findings(name))) for name in names}
            for worker in sides.values():
                worker.ask("check" if check else "step")
            time.sleep(rest)
            for number in range(self.steps):
                rate = sides[names[0]].ask("peak")
                for name in list(sides)[:: -1 if number % 2 else 1]:
                    answers[name].append(sides[name].ask("step"))
                    time.sleep(rest)
                for name in set(self.own) & set(names):
                    answers[name][-1] |= rate
            profile = sides[names[0]].ask("profile")["profile"] if threads == 1 else None
        return answers, profile


def key(row: dict[str, Any]) -> tuple[str, int, str]:
    """What a row is the result of: a newer one takes its place."""
    return row["case"], row["threads"], row["opponent"]
