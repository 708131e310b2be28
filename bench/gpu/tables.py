"""The section of docs/measured/kernels.md that the stages of `python -m bench gpu` fill."""

from __future__ import annotations

from collections.abc import Sequence

from bench.gpu.stages import STAGES
from bench.tables import FACTS, Row, compact, flat, missing, provenance

ABOUT = """What `make gpu-bench` found, stage by stage; those of `head` and `opponents` stand in the next section. Bytes
and seconds are as measured; `gate` says whether results were within their tolerance."""


def blocks(rows: Sequence[Row]) -> list[str]:
    """A table a stage."""
    if not rows:
        return missing("gpu")
    found = [provenance(rows), ABOUT]
    for name, stage in STAGES.items():
        mine = [row for row in rows if row.get("stage") == name and "op" not in row]
        if mine:
            shown = [flat({k: v for k, v in row.items() if k not in (*FACTS, "stage")}) for row in mine]
            found += [f"### {name}: {stage.answers}", *compact(shown)]
    return [block for block in found if block]
