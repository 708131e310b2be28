"""The GAD step with all weights trained, and with adapters of some ranks on one base, at the default job's sizes.

A process each; all take a step in turn, so that a drift of the machine's speed meets all. A row a side: seconds by
phase, the most that was resident in each, sampled tokens a second.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import options, record
from bench.step import problem as problems
from bench.step.process import Worker

THREADS = (1, 2)
RANKS = (16, 64)
STEPS = 5
# As bench.step rests, and why.
REST = 20
BUSY = 0.3
# Of configs/smollm2-cpu.toml: groups and samples of a step, tokens of a prompt and of a response at most.
PROMPTS, SAMPLES, PROMPT, RESPONSE, MICRO_BATCH_GROUPS = 4, 8, 96, 64, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=options.numbers, default=RANKS, help="of the adapters, default 16,64")
    parser.add_argument("--steps", type=options.count, default=STEPS, help=f"timed steps, default {STEPS}")


def run(
    quick: bool, threads: Sequence[int] = THREADS, *, ranks: Sequence[int] = RANKS, steps: int = STEPS
) -> Iterator[dict[str, Any]]:
    """A row for every thread count and side, rank 0 that without adapters.

    quick: a tiny model, one thread, one timed step, no rests; for tests, its timings say nothing. RuntimeError where a
    process fails.
    """
    if not quick and (load := os.getloadavg()[0]) > BUSY:
        record.say(f"this machine is busy (load {load:.1f}): the timings will tell less than they could")
    with tempfile.TemporaryDirectory() as folder:
        path = _problem(Path(folder), quick, 1 if quick else steps)
        for count in [1] if quick else threads:
            answers = _turns(path, count, (0, *ranks), 1 if quick else steps, 0 if quick else REST)
            plain = _rate(answers[0])
            for rank, found in answers.items():
                row = _row(rank, count, found, plain, quick)
                record.say(
                    f"{row['case']}: {row['seconds']:.2f} s a step, {row['peak_bytes'] / 2**30:.2f} GiB at most, "
                    f"{row['tokens_per_s']:.0f} tokens/s, {row['sampling_of_plain']:.2f} of plain"
                )
                yield row


def _problem(folder: Path, quick: bool, steps: int) -> Path:
    student, scorer = problems.random_models(folder, problems.TINY if quick else problems.SHAPE)
    prompt, response, samples = (12, 4, 3) if quick else (PROMPT, RESPONSE, SAMPLES)
    groups = problems.random_groups(student, [prompt] * PROMPTS * (steps + 1), response)
    path = folder / "problem.json"
    made = problems.Problem(
        str(student), str(scorer), groups, PROMPTS, samples, prompt, response, True, MICRO_BATCH_GROUPS
    )
    made.write(path)
    return path


def _turns(path: Path, threads: int, ranks: Sequence[int], steps: int, rest: float) -> dict[int, list[dict[str, Any]]]:
    """By rank the answers to the timed steps; a first one is dropped."""
    answers: dict[int, list[dict[str, Any]]] = {rank: [] for rank in ranks}
    with ExitStack() as stack:
        sides = {}
        for rank in ranks:
            process = ["bench.adapters.side", str(path), str(threads), str(rank)]
            sides[rank] = stack.enter_context(Worker(f"rank {rank}", path, threads, path, process=process))
            sides[rank].ask("step")
        for number in range(steps):
            for rank in list(sides)[:: -1 if number % 2 else 1]:
                time.sleep(rest)
                answers[rank].append(sides[rank].ask("step"))
    return answers


def _rate(answers: Sequence[dict[str, Any]]) -> float:
    """Sampled tokens a second, of CPU time on all threads."""
    return statistics.median(a["response_tokens"] / a["cpu"]["generate"] for a in answers)


def _row(rank: int, threads: int, answers: Sequence[dict[str, Any]], plain: float, quick: bool) -> dict[str, Any]:
    phases = answers[0]["cpu"]
    seconds = {phase: statistics.median(a["cpu"].get(phase, 0.0) for a in answers) for phase in phases}
    peaks = {phase: max(a["peaks"].get(phase, 0) for a in answers) for phase in answers[0]["peaks"]}
    rate = _rate(answers)
    return {
        "op": "GAD step",
        "case": f"rank {rank}" if rank else "all weights",
        "shape": {"P": PROMPT, "R": RESPONSE, "N": SAMPLES, "B": PROMPTS} if not quick else {"P": 12, "R": 4, "N": 3},
        "threads": threads,
        "steps": len(answers),
        "seconds": sum(seconds.values()),
        "seconds_by_phase": seconds,
        "peak_bytes": max(peaks.values(), default=0),
        "peak_bytes_by_phase": peaks,
        "loaded_bytes": answers[0]["loaded_bytes"],
        "tokens_per_s": rate,
        "sampling_of_plain": rate / plain,
    }


def key(row: dict[str, Any]) -> tuple[str, int]:
    """What a row is the result of: a newer one takes its place."""
    return row["case"], row["threads"]
