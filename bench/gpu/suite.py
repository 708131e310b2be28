"""What a first run on a GPU must answer: `python -m bench gpu`, about nine minutes on an H100 or H200.

    python -m bench gpu --rehearse                      the same walk on a CPU with tiny sizes; writes nothing
    python -m bench gpu --only attention,head           some stages
    python -m bench gpu --skip eager,graphs             all but some

Every row is in the file as soon as it is measured, beside what other runs have left there. A stage that fails is a row
with its error, and the others go on; the exit code is 1 then. An opponent that is not installed is a row that says so.
Where there is no GPU nothing is measured, which is said, and is no failure.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from bench import options, record
from bench.gpu import child
from bench.gpu.place import Place, Row
from bench.gpu.stages import STAGES
from gadcore.errors import UserError

SKIPPED = "skipped: no CUDA device (--rehearse walks through it without one)"
MINUTES = 10.0
# A stage may take so many times what was predicted before it is ended.
PATIENCE = 2.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(f"{name} ({stage.seconds} s)" for name, stage in STAGES.items())
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny: what would run, and its rows")
    parser.add_argument("--only", type=options.names, help=f"stages to run, of: {names}")
    parser.add_argument("--skip", type=options.names, default=[], help="stages to leave out")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="no stage begins that would not end by then")


def chosen(only: Sequence[str] | None, skip: Sequence[str]) -> list[str]:
    """The stages to run, in their order. Raises UserError for a name that is none."""
    if unknown := [name for name in [*(only or []), *skip] if name not in STAGES]:
        raise UserError(f"there is no stage {', '.join(unknown)}: use {', '.join(STAGES)}")
    wanted = [name for name, stage in STAGES.items() if (name in only if only else not stage.asked)]
    return [name for name in wanted if name not in skip]


def run(
    quick: bool,
    rehearse: bool = False,
    only: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    minutes: float = MINUTES,
) -> Iterator[Row]:
    """Rows of all stages, each as soon as it is there. quick: tiny sizes, on the GPU."""
    wanted = chosen(only, skip)
    if not rehearse and not _gpu():
        print(SKIPPED)
        return
    total = sum(STAGES[name].seconds for name in wanted)
    record.say(f"gpu: {len(wanted)} stages, {total} s predicted on an H100 or H200:")
    for name in wanted:
        record.say(f"  {name:12} {STAGES[name].seconds:4} s  {STAGES[name].answers}")
    began = time.monotonic()
    for name in wanted:
        stage = STAGES[name]
        left = 60 * minutes - (time.monotonic() - began)
        start = time.monotonic()
        record.say(f"gpu: {name}")
        if not rehearse and stage.seconds > left:
            rows: Iterator[Row] = iter([{"case": "all", "status": "skipped", "error": f"{left:.0f} s were left"}])
        elif rehearse:
            rows = child.here(name, Place.find(rehearse=True, quick=True))
        else:
            rows = child.in_child(name, ["--quick"] * quick, max(60.0, min(left, PATIENCE * stage.seconds)))
        for row in rows:
            if "op" not in row:
                record.say(f"  {told(row)}")
            yield {"stage": name, **row}
        record.say(f"  {name} took {time.monotonic() - start:.0f} s")


def _gpu() -> bool:
    import torch

    # Asked without a context on the device: the memory is the stages'.
    return torch.cuda.is_available()


def told(row: Row) -> str:
    """A row for the terminal."""
    figures = {k: v for k, v in row.items() if k not in ("case", "status", "machine") and v is not None}
    said = ", ".join(f"{k} {_figure(v)}" for k, v in figures.items())
    return f"{row['case']}: {row['status']}{', ' if said else ''}{said}"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def key(row: Row) -> str:
    """What a row is the result of: of the newest run alone it stays."""
    gpu = (row.get("machine") or {}).get("gpu")
    names = ("stage", "case") if "case" in row else ("stage", "op", "direction", "opponent", "shape", "dtype", "config")
    return json.dumps([gpu, *(row.get(name) for name in names)], sort_keys=True)
