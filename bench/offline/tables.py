"""The sections of docs/measured/kernels.md on what is known of the Triton kernels without a GPU."""

from __future__ import annotations

from collections.abc import Sequence

from bench.tables import Read, Row, as_they_are, table

AOT = """What Triton's own launch code compiles for each target at production shapes; nothing ran on a GPU. A row
is one piece of machine code; `programs` is the size of the grid for every shape that uses it. The gate, for ours: no
spills (no LDL, no STL), a fast matrix instruction where there is a product (HMMA on sm_80, HGMMA on sm_90, UTCMMA on
sm_100), shared memory within the limit. Liger-Kernel's are read in the same way and not judged."""

TRAFFIC = """Counted under Triton's interpreter; rows named `all` are a whole op. MB are 10^6 bytes. Minimum: every
byte of the inputs once and of the outputs once. Requested: what lanes ask for. Sectors: 32-byte sectors of every tile
operation. Unique: sectors of a launch, each once. Modelled: what an L2 would let through, a model and no measurement.
Products outside Triton count with their least on both sides."""


def sections(read: Read) -> list[tuple[str, list[str]]]:
    """(title, blocks) of each suite."""
    return [
        ("Ahead-of-time compilation", as_they_are(read("aot"), "aot", AOT, by="op", summary=_targets)),
        ("Traffic", as_they_are(read("traffic"), "traffic", TRAFFIC, by="op")),
    ]


def _targets(rows: Sequence[Row]) -> str:
    """The suite aot in a line for each target of ours and of Liger's."""
    header = ["impl", "target", "pieces of code", "that spill", "largest shared bytes", "failed gates"]
    lines = []
    for impl, target in dict.fromkeys((row["impl"], row["target"]) for row in rows):
        mine = [row for row in rows if (row["impl"], row["target"]) == (impl, target)]
        spilling, shared = sum(row["spill_bytes"] > 0 for row in mine), max(row["shared_bytes"] for row in mine)
        judged = [row["gate"] == "fail" for row in mine if "gate" in row]
        lines.append([impl, target, *map(str, (len(mine), spilling, shared)), str(sum(judged)) if judged else "-"])
    return table(header, sorted(lines, key=lambda line: line[0] != "triton"))
