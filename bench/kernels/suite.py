"""CPU timings of every kernel, fp32, on one thread and on two: a child process each, so that both start alike."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import record

THREADS = (1, 2)
BUSY = 0.3

# Heads: SmolLM2-135M's, whose weight is 108 MiB.
WIDTH, VOCABULARY = 576, 49152
# (K, N) of its MLP, both ways, and of its head; the weights of 30 layers in turn, as in decoding, are in no cache.
FEW_ROWS = (8, 16, 32, 64)
LINEARS = ((576, 1536, 30), (1536, 576, 30), (576, 1536, 1), (1536, 576, 1), (576, 49152, 1))


def run(quick: bool, threads: Sequence[int] = THREADS) -> list[dict[str, Any]]:
    """All comparisons. quick: small shapes, one thread, no compilers; for tests, its timings say nothing.

    threads: counts to measure with; those above this machine's cores are left out. Raises RuntimeError where a child
    process fails.
    """
    if quick:
        threads = [1]
    elif (load := os.getloadavg()[0]) > BUSY:
        record.say(f"this machine is busy (load {load:.1f}): the timings will tell less than they could")
    rows: list[dict[str, Any]] = []
    for count in threads:
        if count > record.cores():
            record.say(f"{count} threads: left out, this machine has {record.cores()} cores")
            continue
        rows += _child(count, quick)
    return rows


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """A machine with other instructions is measured beside the one before, not in place of it."""
    facts = (row["machine"].get("isa"), row["op"], row["opponent"], row["direction"], row["shape"], row.get("config"))
    return (str(row["threads"]), *(json.dumps(fact, sort_keys=True) for fact in facts))


def _child(threads: int, quick: bool) -> list[dict[str, Any]]:
    # Before torch is loaded in the child. passive: waiting threads do not take the core that the others work on.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "PYTHONWARNINGS": "ignore",
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.json"
        command = [sys.executable, "-m", "bench.kernels.suite", "--threads", str(threads), "--out", str(out)]
        code = subprocess.run([*command, *(["--quick"] if quick else [])], cwd=record.ROOT, env=environment).returncode
        if code:
            raise RuntimeError(f"the measurement with {threads} threads ended with exit code {code}")
        return json.loads(out.read_text())


def measured(threads: int, quick: bool) -> Iterator[dict[str, Any]]:
    """Every result in this process, as soon as it is there."""
    import torch

    from bench import peak
    from bench.kernels import cases
    from bench.kernels.compare import Setup, line, measure
    from bench.runner import Rounds, wall

    setup = Setup("kernels", "cpu", torch.float32, "cpu", threads, wall, peak.extra_peak)
    short = Rounds(1, 1, 0.0) if quick else Rounds(15, 60, 1.0)

    def all_cases() -> Iterator[cases.KernelCase]:
        for size in sizes(threads, quick):
            yield from cases.head_cases(size, setup)
        yield cases.score_case(*((2, 4, 3, 64) if quick else (32, 8, 32, 576)), short, setup)
        for tokens in (256,) if quick else (4096, 65536):
            yield cases.ratio_case(tokens, short, setup)
        for rows in (8,) if quick else FEW_ROWS:
            for width, outputs, copies in ((64, 96, 2),) if quick else LINEARS:
                yield cases.few_rows_case(rows, width, outputs, copies, short, setup)

    for case in all_cases():
        results = measure(case, setup)
        # An opponent's import may have changed it.
        if torch.get_num_threads() != threads:
            raise RuntimeError(f"PyTorch computes with {torch.get_num_threads()} threads, should with {threads}")
        for result in results:
            record.say(line(result))
            yield record.as_row(result)


def sizes(threads: int, quick: bool) -> list[Any]:
    from bench.kernels.cases import COMPILED, CUT, NAIVE, TRL, Size
    from bench.runner import Rounds

    if quick:
        once = Rounds(2, 2, 0.0)
        return [Size(64, 32, 500, frozenset({NAIVE}), once, once, length=8)]
    everyone = frozenset({NAIVE, COMPILED, CUT, TRL})
    close, wide = Rounds(3, 7, 50.0), Rounds(3, 5, 30.0)
    # At the larger T two threads tell nothing about the slow opponents that one does not.
    largest = everyone if threads == 1 else frozenset({TRL})
    return [
        Size(1024, WIDTH, VOCABULARY, everyone, close, wide),
        Size(4096, WIDTH, VOCABULARY, largest, close, Rounds(2, 3, 80.0), logprob_backward=False),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The child process: one thread count, results to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    record.write(options.out, list(measured(options.threads, options.quick)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
