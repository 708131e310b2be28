"""python -m bench SUITE [--quick] [--out FILE] [..]: measures; python -m bench SUITE --help: the options of a suite.

python -m bench tables [--out FILE]: writes docs/measured from what was measured.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import options, record
from bench.suites import SUITES, TABLES, Suite
from gadcore.errors import UserError

ABOUT_TABLES = (
    "docs/measured/kernels.md, step.md, trl.md, soda.md, rollout.md, memory.md, adapters.md, reshard.md, findings.md, "
    "default-job.md, methods.md, from what lies in bench/results"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where a correctness gate failed or a measurement broke off; 2 for wrong arguments."""
    given = _parser().parse_args(arguments)
    if given.suite == "tables":
        return _tables(given.rest)
    suite = SUITES[given.suite]
    module = importlib.import_module(suite.module)
    wanted = _options(given.suite, suite, module, given.rest)
    small, out = wanted["quick"] or wanted.get("rehearse", False), wanted.pop("out")
    try:
        return _measure(given.suite, module, wanted, out or (None if small else record.path_of(given.suite)))
    except UserError as error:
        print(f"bench: {given.suite}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"bench: {given.suite}: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:9}{suite.help}" for name, suite in SUITES.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        usage="python -m bench SUITE [-h] [--quick] [--out FILE] [..]",
        description=f"Measures the kernels and the whole step.\n\nsuites:\n{listed}\n  {'tables':9}{ABOUT_TABLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", choices=[*SUITES, "tables"], metavar="SUITE", help="one of those above")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="..", help="its options: SUITE --help lists them")
    return parser


def _options(name: str, suite: Suite, module: Any, arguments: Sequence[str]) -> dict[str, Any]:
    """Parameters of the suite's run(), and out."""
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=suite.help)
    if hasattr(module, "add_arguments"):
        module.add_arguments(parser)
    parser.add_argument("--quick", action="store_true", help="small shapes, seconds; writes a file only with --out")
    parser.add_argument("--out", type=Path, help=f"file to write, default bench/results/{name}.json")
    if suite.threads:
        parser.add_argument(
            "--threads", type=options.threads, default=module.THREADS, help="thread counts, default 1,2"
        )
    if suite.passes_on is None:
        return vars(parser.parse_args(arguments))
    known, more = parser.parse_known_args(arguments)
    return {**vars(known), suite.passes_on: more}


def _measure(name: str, module: Any, wanted: dict[str, Any], out: Path | None) -> int:
    """The exit code, after a word on where the rows are and on the gates."""
    rows: list[dict[str, Any]] = []
    key = getattr(module, "key", None)
    for row in module.run(**wanted):
        rows += record.stamped(name, [row])
        if out is not None and key:
            record.write(out, record.merged(record.read(out), rows, key))
    if not rows:
        return 0
    if out is None:
        print(f"{len(rows)} results of small shapes, not written: name a file with --out")
    else:
        if not key:
            record.write(out, rows)
        print(f"{len(rows)} results: {out}")
    failed = sum(row.get("gate") == "fail" for row in rows)
    if failed:
        print(f"bench: {failed} of {len(rows)} correctness gates FAILED", file=sys.stderr)
    return int(failed > 0)


def _tables(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench tables", description=ABOUT_TABLES)
    parser.add_argument("--out", type=Path, help="writes the kernels' document alone, to this file")
    out = parser.parse_args(arguments).out
    modules = [importlib.import_module(name) for name in TABLES]
    files = {out: modules[0].document()} if out else {k: v for module in modules for k, v in module.files().items()}
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if path.suffix != ".svg":
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
