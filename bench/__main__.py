"""python -m bench SUITE [WHAT] [--quick] [--out FILE] [--threads N[,N]]

python -m bench step [--cases NAME[,NAME]] [--beside NAME[,NAME]] [--steps N] [--data FILE] and the above

WHAT and --seeds are for the suite paper. python -m bench real RUN RUN .. [--steps N,N] [settings of eval]
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import record
from gadcore.errors import UserError

SUITES = {
    "kernels": "CPU timings of every kernel beside its opponents",
    "step": "the whole GAD step beside TRL and beside the paper's literal schedule, on the CPU",
    "rollout": "tokens per second of the sampler beside stock vLLM and Hugging Face's generate(), on the CPU",
    "gpu": "the same on a CUDA device; skipped where there is none",
    "traffic": "bytes, launches and FLOPs of the Triton kernels under the interpreter",
    "aot": "registers, spills and shared memory of the Triton kernels, compiled for GPUs that need not be there",
    "paper": "the paper's findings on toys: mixture, language, fresh, or all of them",
    "memory": "bytes by state of runs that share the device by turns, and a run under a limit",
    "real": "runs on real text, GAD's first, compared over their seconds of training",
    "tables": "docs/kernels.md, step.md, rollout.md, memory.md, findings.md, from what lies in bench/results",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a correctness gate failed or a measurement broke off; 2 for wrong arguments."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["real"]:
        return _real(arguments[1:])
    options = _parser().parse_args(arguments)
    if options.threads and options.suite not in ("kernels", "step", "rollout"):
        return _refuse(f"--threads is for the suites kernels, step and rollout, not for {options.suite}")
    if options.suite != "step" and (options.cases or options.data or options.beside or options.steps):
        return _refuse(f"--cases, --beside, --steps and --data are for the suite step, not for {options.suite}")
    if options.suite != "paper" and (options.what or options.seeds):
        return _refuse(f"{options.what or '--seeds'} is for the suite paper, not for {options.suite}")
    if options.suite == "paper":
        return _paper(options)
    if options.suite == "tables":
        return _tables(options)
    if options.suite == "step":
        return _step(options)
    try:
        rows = _measure(options)
    except RuntimeError as error:
        print(f"bench: {options.suite}: {error}", file=sys.stderr)
        return 1
    if not rows:
        return 0
    out = _out(options)
    if out is not None:
        rows = record.stamped(options.suite, rows)
        # Thread counts are measured one by one as well.
        key = importlib.import_module("bench.suites.rollout").key if options.suite == "rollout" else None
        record.write(out, _merged(out, rows, key) if key else rows)
    return _told(rows, out)


def _merged(out: Path, rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """The rows of the file, but those that are results of the same as new ones."""
    return list(({key(old): old for old in record.read(out)} | {key(new): new for new in rows}).values())


def _out(options: argparse.Namespace) -> Path | None:
    return options.out or (None if options.quick else record.path_of(options.suite))


def _told(rows: list[dict[str, Any]], out: Path | None) -> int:
    """The exit code, after a word on where the rows are and on the gates."""
    if out is None:
        print(f"{len(rows)} results of --quick, not written: name a file with --out")
    else:
        print(f"{len(rows)} results: {out}")
    failed = sum(row.get("gate") == "fail" for row in rows)
    if failed:
        print(f"bench: {failed} of {len(rows)} correctness gates FAILED", file=sys.stderr)
    return int(failed > 0)


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.suite == "gpu":
        return importlib.import_module("bench.gpu").run(options.quick)
    suite = importlib.import_module(f"bench.suites.{options.suite}")
    return list(suite.run(options.quick, options.threads) if options.threads else suite.run(options.quick))


def _step(options: argparse.Namespace) -> int:
    """Hours long, so every row is written when it is there, and rows of other cases in the file stay."""
    step = importlib.import_module("bench.suites.step")
    key = importlib.import_module("bench.step.comparison").key
    if unknown := sorted(set(options.cases or ()) - {case.name for case in step.CASES}):
        return _refuse(f"no case {', '.join(unknown)}: there are {', '.join(case.name for case in step.CASES)}")
    opponents = options.beside or step.OPPONENTS
    if unknown := sorted(set(opponents) - set(step.OPPONENTS)):
        return _refuse(f"no opponent {', '.join(unknown)}: there are {', '.join(step.OPPONENTS)}")
    more = {"only": options.cases or (), "opponents": opponents, "data": options.data}
    out = _out(options)
    rows: list[dict[str, Any]] = []
    threads = options.threads or step.THREADS
    try:
        for row in step.run(options.quick, threads, steps=options.steps or step.STEPS, **more):
            rows += record.stamped("step", [row])
            if out is not None:
                record.write(out, _merged(out, rows, key))
    except RuntimeError as error:
        print(f"bench: step: {error}", file=sys.stderr)
        return 1
    return _told(rows, out)


def _paper(options: argparse.Namespace) -> int:
    """Minutes an arm, so every row is written when it is there, and rows of other arms and seeds in the file stay."""
    paper = importlib.import_module("bench.suites.paper")
    if options.what not in (None, *paper.EXPERIMENTS):
        return _refuse(f"no experiment {options.what}: there are {', '.join(paper.EXPERIMENTS)}")
    out = _out(options)
    rows: list[dict[str, Any]] = []
    which = [options.what] if options.what else paper.EXPERIMENTS
    for row in paper.run(options.quick, options.seeds or paper.SEEDS, which):
        rows += record.stamped("paper", [row])
        if out is not None:
            record.write(out, _merged(out, rows, paper.key))
    return _told(rows, out)


def _real(arguments: list[str]) -> int:
    """Hours long; what is drawn and tested is kept, so the same command goes on. The file is made anew every time."""
    parser = argparse.ArgumentParser(prog="python -m bench real", description="The other settings are those of eval.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, the one of GAD first")
    parser.add_argument("--steps", type=_numbers, default=(), help="checkpoints of the first run, default all")
    parser.add_argument("--quick", action="store_true", help="four rows; writes a file only with --out")
    parser.add_argument("--out", type=Path, help="file to write, default bench/results/real.json")
    options, more = parser.parse_known_args(arguments)
    real = importlib.import_module("bench.paper.real")
    options.suite = "real"
    out = _out(options)
    try:
        rows = record.stamped("real", real.run(options.runs, options.quick, options.steps, more))
    except UserError as error:
        return _refuse(f"real: {error}")
    except RuntimeError as error:
        print(f"bench: real: {error}", file=sys.stderr)
        return 1
    if out is not None:
        record.write(out, rows)
    return _told(rows, out)


def _tables(options: argparse.Namespace) -> int:
    """--out: one file for the kernels alone."""
    others = ("bench.tables_step", "bench.tables_rollout", "bench.tables_memory", "bench.paper.findings")
    names = ("bench.tables", *(() if options.out else others))
    for name in names:
        tables = importlib.import_module(name)
        out = options.out or tables.DOCUMENT
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(tables.document(), encoding="utf-8")
        if name == "bench.paper.findings":
            tables.write()
        print(out)
    return 0


def _refuse(message: str) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return 2


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,2") from None


def _threads(text: str) -> list[int]:
    counts = _numbers(text)
    if any(not 1 <= count <= record.cores() for count in counts):
        raise argparse.ArgumentTypeError(f"must be from 1 to {record.cores()}, the cores of this machine, are {text}")
    return counts


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number from 1, is {text}")
    return int(text)


def _names(text: str) -> list[str]:
    return text.split(",")


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:9}{what}" for name, what in SUITES.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"Measures the kernels and the whole step.\n\nsuites:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", choices=list(SUITES), metavar="SUITE")
    parser.add_argument("what", nargs="?", metavar="WHAT", help="of the suite paper: mixture, language or fresh")
    parser.add_argument("--seeds", type=_count, help="seeds of the suite paper, default 3")
    parser.add_argument("--quick", action="store_true", help="small shapes, seconds; writes a file only with --out")
    parser.add_argument("--out", type=Path, help="file to write, default bench/results/SUITE.json")
    parser.add_argument("--threads", type=_threads, help="thread counts of the suites kernels and step, default 1,2")
    parser.add_argument("--cases", type=_names, help="cases of the suite step, default all")
    parser.add_argument("--beside", type=_names, help="opponents of the suite step, default TRL,literal")
    parser.add_argument("--steps", type=_count, help="timed steps of the suite step, default 3")
    parser.add_argument("--data", type=Path, help="rows for the real text of the suite step")
    return parser


if __name__ == "__main__":
    sys.exit(main())
