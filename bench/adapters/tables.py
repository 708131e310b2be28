"""docs/measured/adapters.md, from bench/results/adapters.json and learning.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import record
from bench.learning import tables as learning
from bench.tables import Read, mib, missing, provenance, rows_of, table

DOCUMENT = record.DOCUMENTS / "adapters.md"
TITLE = "# Adapters on one base, beside all weights"
ABOUT = """Made by `python -m bench tables` from bench/results/adapters.json, which `python -m bench adapters` measures:
a GAD step at the sizes of the default job (SmolLM2-135M's shape, fp32, vLLM on the CPU), student and discriminator with
all weights trained, and with adapters of a rank on one base that the sampler shares. A process a side; all take a step
in turn. Seconds are medians of the timed steps, the memory is the most that was resident in a phase. Sampling: tokens a
second, and their share of what the side without adapters samples."""


def files() -> dict[Path, str]:
    return {DOCUMENT: document()}


def document(read: Read = rows_of) -> str:
    """The whole file."""
    rows = read("adapters")
    blocks = [TITLE, ABOUT, *([provenance(rows)] if rows else missing("adapters"))]
    for threads in sorted({row["threads"] for row in rows}):
        mine = [row for row in rows if row["threads"] == threads]
        blocks += [f"## At {threads} thread{'s' if threads > 1 else ''}", _steps(mine), _memory(mine)]
    blocks += learning.blocks(read("learning"))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _steps(rows: Sequence[dict[str, Any]]) -> str:
    # What takes less than a hundredth of a step is none of what anybody waits for.
    long = [name for name, seconds in rows[0]["seconds_by_phase"].items() if seconds > 0.01 * rows[0]["seconds"]]
    header = ["side", "step s", *(f"{name} s" for name in long), "tokens/s", "sampling beside all weights"]
    body = [
        [
            row["case"],
            f"{row['seconds']:.1f}",
            *(f"{row['seconds_by_phase'][name]:.2f}" for name in long),
            f"{row['tokens_per_s']:.0f}",
            f"{row['sampling_of_plain']:.2f}",
        ]
        for row in rows
    ]
    return table(header, body)


def _memory(rows: Sequence[dict[str, Any]]) -> str:
    phases = list(rows[0]["peak_bytes_by_phase"])
    header = ["side, MiB", "at most", "once loaded", *phases]
    body = [
        [
            row["case"],
            mib(row["peak_bytes"]),
            mib(row["loaded_bytes"]),
            *(mib(row["peak_bytes_by_phase"][phase]) for phase in phases),
        ]
        for row in rows
    ]
    return table(header, body)
