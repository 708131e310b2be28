"""python -m bench SUITE [--quick] [--out FILE] [--threads N[,N]]"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import record

SUITES = {
    "kernels": "CPU timings of every kernel beside its opponents",
    "gpu": "the same on a CUDA device; skipped where there is none",
    "traffic": "bytes, launches and FLOPs of the Triton kernels under the interpreter",
    "aot": "registers, spills and shared memory of the Triton kernels, compiled for GPUs that need not be there",
    "tables": "docs/kernels.md, from the results that lie in bench/results",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a correctness gate failed or a measurement broke off; 2 for wrong arguments."""
    options = _parser().parse_args(arguments)
    if options.threads and options.suite != "kernels":
        return _refuse(f"--threads is for the suite kernels, not for {options.suite}")
    if options.suite == "tables":
        return _tables(options)
    try:
        rows = _measure(options)
    except RuntimeError as error:
        print(f"bench: {options.suite}: {error}", file=sys.stderr)
        return 1
    if not rows:
        return 0
    out = options.out or (None if options.quick else record.path_of(options.suite))
    if out is None:
        print(f"{len(rows)} results of --quick, not written: name a file with --out")
    else:
        record.write(out, record.stamped(options.suite, rows))
        print(f"{len(rows)} results: {out}")
    failed = sum(row.get("gate") == "fail" for row in rows)
    if failed:
        print(f"bench: {failed} of {len(rows)} correctness gates FAILED", file=sys.stderr)
    return int(failed > 0)


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.suite == "gpu":
        return importlib.import_module("bench.gpu").run(options.quick)
    suite = importlib.import_module(f"bench.suites.{options.suite}")
    return suite.run(options.quick, options.threads) if options.threads else suite.run(options.quick)


def _tables(options: argparse.Namespace) -> int:
    tables = importlib.import_module("bench.tables")
    out = options.out or tables.DOCUMENT
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(tables.document(), encoding="utf-8")
    print(out)
    return 0


def _refuse(message: str) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return 2


def _threads(text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,2") from None
    if any(not 1 <= count <= record.cores() for count in counts):
        raise argparse.ArgumentTypeError(f"must be from 1 to {record.cores()}, the cores of this machine, are {text}")
    return counts


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:9}{what}" for name, what in SUITES.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"Measures the kernels.\n\nsuites:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", choices=list(SUITES), metavar="SUITE")
    parser.add_argument("--quick", action="store_true", help="small shapes, seconds; writes a file only with --out")
    parser.add_argument("--out", type=Path, help="file to write, default bench/results/SUITE.json")
    parser.add_argument("--threads", type=_threads, help="thread counts of the suite kernels, default 1,2")
    return parser


if __name__ == "__main__":
    sys.exit(main())
