"""Tokens per second of gadcore's sampler beside vLLM as it comes and Hugging Face's generate(), on a CPU.

Every side runs in processes of its own, which take turns; within one, batches of several numbers of rows follow each
other. Whether a sampler's log-probs are the trainer's is for tests/engine to say; the gate
here is that every side samples exactly the tokens that were asked for.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import record

SIDES = ("ours", "vllm", "vllm eager", "hf")
THREADS = (1, 2)
ROUNDS = 2
SAMPLES = 8
PROMPT, RESPONSE = 64, 64
# Of 8 samples each.
PROMPTS = (1, 2, 4, 8)


def run(quick: bool, threads: Sequence[int] = THREADS) -> list[dict[str, Any]]:
    """A row for every number of rows, thread count and opponent.

    quick: a tiny model, one round, 8 rows, nothing compiled; for tests, its timings say nothing.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        problem = _problem(Path(folder), quick)
        if quick:
            return _compare(problem, 1, ("ours", "vllm eager", "hf"), (1,), 1)
        for count in [count for count in threads if count <= record.cores()]:
            rows += _compare(problem, count, SIDES, PROMPTS, ROUNDS)
    return rows


def _problem(folder: Path, quick: bool) -> Path:
    from bench.step import problem

    student, discriminator = problem.random_models(folder, problem.TINY if quick else problem.SHAPE)
    prompt, response = (12, 4) if quick else (PROMPT, RESPONSE)
    groups = problem.random_groups(student, [prompt] * max(PROMPTS), response)
    path = folder / "problem.json"
    problem.Problem(
        str(student),
        str(discriminator),
        groups,
        max(PROMPTS),
        SAMPLES,
        prompt,
        response,
        forced=True,
        groups_at_once=1,
    ).write(path)
    return path


def _compare(
    problem: Path, threads: int, sides: Sequence[str], prompts: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    rates: dict[str, dict[int, list[float]]] = {side: defaultdict(list) for side in sides}
    for number in range(rounds):
        for side in sides[:: -1 if number % 2 else 1]:
            for batch, runs in _measure(side, problem, threads, prompts).items():
                rates[side][batch] += runs
    rows = []
    for side in sides[1:]:
        for batch, theirs in rates[side].items():
            ours = rates["ours"][batch]
            row = {
                "op": "rollout",
                "impl": "cpu",
                "opponent": side,
                "shape": {"rows": batch, "N": SAMPLES, "P": PROMPT, "R": RESPONSE},
                "dtype": "float32",
                "threads": threads,
                "ours": _rate(ours),
                "theirs": _rate(theirs),
                "ratio": statistics.median(ours) / statistics.median(theirs),
                "gate": "pass",
            }
            record.say(
                f"rollout {batch} rows {threads} threads: {row['ours']['tokens_per_s']:.0f} tokens/s, {side} "
                f"{row['theirs']['tokens_per_s']:.0f}: x{row['ratio']:.2f}"
            )
            rows.append(row)
    return rows


def _rate(runs: list[float]) -> dict[str, Any]:
    median = statistics.median(runs)
    return {"runs": runs, "tokens_per_s": median, "spread": (max(runs) - min(runs)) / median}


def _measure(side: str, problem: Path, threads: int, prompts: Sequence[int]) -> dict[int, list[float]]:
    command = [sys.executable, "-m", "bench.rollout.worker", side, str(problem), str(threads), *map(str, prompts)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "2000",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(command, cwd=record.ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the process of {side} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return {int(batch): runs for batch, runs in json.loads(done.stdout.splitlines()[-1]).items()}


def key(row: dict[str, Any]) -> tuple[int, int, str]:
    """What a row is the result of: a newer one takes its place."""
    return row["threads"], row["shape"]["rows"], row["opponent"]
