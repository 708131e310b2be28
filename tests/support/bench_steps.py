"""Timed steps as the processes of the suite `step` report them, of made-up figures, and rows of them."""

from __future__ import annotations

from typing import Any

from bench import record
from bench.step import comparison


def answer(*, ours: bool, gib: float = 1.0, **seconds: float) -> dict[str, Any]:
    """One timed step as a process reports it; all on one thread."""
    out: dict[str, Any] = {"cpu": seconds, "wall": {phase: 2 * s for phase, s in seconds.items()}}
    out |= {"peak_bytes": int(gib * 2**30), "loaded_bytes": 2**29, "response_tokens": 64}
    if ours:
        out |= {"flops": {"generate": 100, "policy": 300}, "flops_per_s": 100.0}
    return out


def row(**changes: Any) -> dict[str, Any]:
    ours = [answer(ours=True, generate=2.0, policy=4.0, optimizer=2.0)] * 3
    theirs = [answer(ours=False, gib=2.0, generate=30.0, policy=18.0)] * 3
    made = {
        "op": "GAD step",
        "opponent": "TRL",
        "case": "64x32",
        "shape": {"P": 64, "R": 32, "N": 8, "B": 2},
        "threads": 1,
        "config": {"lengths": "forced", "model": "random"},
        "error": {"ours": {"rewards": 1e-7}, "TRL": {"rewards": 2e-7}},
        "tolerance": 1e-5,
        "gate": "pass",
        **comparison.compare(ours, theirs, 1),
    }
    return record.stamped("step", [made | changes])[0]
