"""Every Triton kernel, compiled by its own launch code for GPUs that need not be there, at production shapes.

The gate, for ours: no spills, a matrix instruction of the target's fast kind where there is a dot, shared memory within
the target's limit. Liger-Kernel's kernels for the same work are read in the same way, and not judged.

One row is one piece of machine code: a kernel, in one configuration that its autotuner may choose, for one target.
Shapes that lead to the same code share it; `programs` gives the size of the grid for each of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from bench.offline.aot_backbone import backbone
from bench.offline.aot_cases import (
    FEW_TOKENS,
    TOKENS,
    VOCABULARIES,
    WIDTHS,
    AotCase,
    Heads,
    Shape,
    liger_cases,
    our_cases,
    unusual_cases,
)

TARGETS = (80, 90, 100)
# Spills that the gate lets pass, by kernel, dtype and padded head size: bytes stored and loaded at most, and why.
EXCEPTIONS = {
    ("_d_query_kernel", "float32", 128): (
        64,
        "exact fp32 products hold both rows of 128 numbers in registers: the smallest tile spills the least, others "
        "that were compiled 580 bytes and more",
    ),
}


def run(quick: bool) -> list[dict[str, Any]]:
    """Rows of the suite; quick: one shape, for sm_90. Raises RuntimeError in a process with TRITON_INTERPRET=1."""
    import torch

    from bench.offline.aot import resources
    from bench.offline.fakegpu import compile_only

    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for target in (90,) if quick else TARGETS:
        for case, shape in _cases(quick):
            with compile_only(target) as launches:
                case.call(shape, getattr(torch, case.dtype))
            for launch in launches:
                found = resources(launch)
                key = (case.op, case.variant, case.dtype, case.impl, launch.compiled.hash)
                if key not in rows:
                    rows[key] = _row(case, shape, target, launch, found)
                grids = rows[key]["programs"]
                if (grid := f"{shape}: {launch.programs}") not in grids:
                    grids.append(grid)
    return [{**row, "programs": ", ".join(row["programs"])} for row in rows.values()]


def _row(case: AotCase, shape: Shape | Heads, target: int, launch: Any, found: Any) -> dict[str, Any]:
    faults = found.faults()
    excused = _excused(case, shape, launch, found)
    instructions = found.instructions
    row = {
        "op": case.op,
        "variant": case.variant,
        "impl": case.impl,
        "dtype": case.dtype,
        "kernel": launch.kernel,
        "config": _config(launch.config, found),
        "target": f"sm_{target}",
        "H": shape.H,
        "programs": [],
        "registers": found.registers,
        "spill_bytes": found.spill_bytes,
        "LDL_and_STL": found.local_accesses,
        "shared_bytes": found.shared_bytes,
        "tensor_memory": found.tensor_memory,
        "programs_of_sm": found.programs_of_sm,
        "occupancy": found.occupancy,
        "products": found.products,
        **{name: instructions.get(name, 0) for name in ("HMMA", "HGMMA", "UTCMMA", "UTMALDG", "LDGSTS", "ATOMIC")},
        "serialised": found.serialised,
        "faults": "; ".join(faults),
        "seconds": round(launch.seconds, 2),
    }
    # Liger's is reported and not judged: its faults are no failure of this suite.
    if case.impl != "triton":
        return row
    if excused and len(faults) == 1:
        return {**row, "gate": "pass", "exception": excused}
    return {**row, "gate": "fail" if faults else "pass"}


def _excused(case: AotCase, shape: Shape | Heads, launch: Any, found: Any) -> str | None:
    """Why a spill is let pass; None where there is none, or one too many."""
    padded = 128 if isinstance(shape, Heads) and shape.D > 64 else 64
    most, reason = EXCEPTIONS.get((launch.kernel, case.dtype, padded), (0, None))
    return reason if 0 < found.spill_bytes <= most else None


def _config(config: dict[str, Any], found: Any) -> str:
    blocks = [f"{name}={value}" for name, value in config.items() if name.isupper()]
    return " ".join([*blocks, f"warps={found.warps}", f"stages={found.stages}"])


def _cases(quick: bool) -> Iterator[tuple[AotCase, Shape | Heads]]:
    production = [Shape(*sizes) for sizes in itertools.product(TOKENS, WIDTHS, VOCABULARIES)]
    few = Shape(FEW_TOKENS, WIDTHS[0], VOCABULARIES[0])
    plain, unusual, liger = our_cases(), unusual_cases(), liger_cases()
    for case in plain:
        yield from ((case, shape) for shape in (production[:1] if quick else production))
    if not quick:
        yield from ((case, shape) for case in unusual for shape in production[:1])
        yield from ((case, few) for case in plain if case.op.startswith("linear_logprob"))
    yield from backbone(quick)
    for case in liger:
        yield from ((case, shape) for shape in (production[:1] if quick else production))
