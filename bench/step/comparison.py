"""The arithmetic of a comparison of whole steps: timings and ratios of two sides, shares of the product limit."""

from __future__ import annotations

import statistics
from typing import Any

from bench import record

# Relative L2 error against fp64 that every finding of both sides must keep.
TOLERANCE = 1e-5
# The worst single parameter may be one of small gradient, beside which rounding counts more.
TOLERANCE_WORST = 1e-4


def within(errors: dict[str, float]) -> bool:
    # `<=` so that nan fails.
    return all(e <= (TOLERANCE_WORST if "worst" in name else TOLERANCE) for name, e in errors.items())


def compare(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], threads: int) -> dict[str, Any]:
    """Timings, ratios and shares of the product limit, from the answers of both sides step by step.

    The clock is CPU time on one thread, wall time on more; both are kept. ratio: median over steps of theirs / ours.
    ratio_without_sampling: the same without sampling and weight updates on either side. ratio_their_sampling_free:
    their step without sampling over our whole one. memory_ratio: ours / theirs.
    limit: FLOPs of a step that the mathematics asks for, over what the products alone could do in the time.
    """
    clock = "cpu" if threads == 1 else "wall"
    a, b = [_seconds(x, clock) for x in ours], [_seconds(x, clock) for x in theirs]
    trained_a, trained_b = ([_seconds(x, clock, sampling=False) for x in side] for side in (ours, theirs))
    peaks = [_side(side, clock) for side in (ours, theirs)]
    known = peaks[0]["peak_bytes"] and peaks[1]["peak_bytes"]
    return {
        "clock": clock,
        "ours": peaks[0],
        "theirs": peaks[1],
        "ratio": record.ratio_of(a, b),
        "ratio_without_sampling": record.ratio_of(trained_a, trained_b),
        "ratio_their_sampling_free": record.ratio_of(a, trained_b),
        "memory_ratio": peaks[0]["peak_bytes"] / peaks[1]["peak_bytes"] if known else None,
        "limit": limit(ours, clock),
    }


SAMPLING = ("generate", "weight update")


def _seconds(answer: dict[str, Any], clock: str, *, sampling: bool = True) -> float:
    return sum(s for phase, s in answer[clock].items() if sampling or phase not in SAMPLING)


def _side(answers: list[dict[str, Any]], clock: str) -> dict[str, Any]:
    runs = [_seconds(x, clock) for x in answers]
    median = statistics.median(runs)
    peaks = [x["peak_bytes"] for x in answers]
    peak = None if None in peaks else max(peaks)
    return {
        "runs": runs,
        "median_s": median,
        "min_s": min(runs),
        "max_s": max(runs),
        "spread": (max(runs) - min(runs)) / median,
        "cpu_s": statistics.median(_seconds(x, "cpu") for x in answers),
        "wall_s": statistics.median(_seconds(x, "wall") for x in answers),
        "phases_s": _phases(answers, clock),
        "peak_bytes": peak,
        "peak_over_loaded_bytes": None if peak is None else peak - answers[0]["loaded_bytes"],
        "response_tokens": [x["response_tokens"] for x in answers],
    }


def _phases(answers: list[dict[str, Any]], clock: str) -> dict[str, float]:
    names = dict.fromkeys(phase for x in answers for phase in x[clock])
    return {phase: statistics.median(x[clock].get(phase, 0.0) for x in answers) for phase in names}


def limit(ours: list[dict[str, Any]], clock: str) -> dict[str, Any]:
    """The rate of a large product in this run, FLOPs by phase, and the share of the limit that each phase reached.

    The share of the whole step is that of all its FLOPs over all its time, phases without products included.
    """
    rate = statistics.median(x["flops_per_s"] for x in ours)

    def share(phase: str) -> float:
        return statistics.median(x["flops"][phase] / x["flops_per_s"] / x[clock][phase] for x in ours)

    whole = statistics.median(sum(x["flops"].values()) / x["flops_per_s"] / _seconds(x, clock) for x in ours)
    phases = ours[0]["flops"]
    return {
        "flops_per_s": rate,
        "flops": {phase: statistics.median(x["flops"][phase] for x in ours) for phase in phases},
        "share": {phase: share(phase) for phase in phases} | {"step": whole},
    }


def line(row: dict[str, Any]) -> str:
    """A row for the terminal; without a speed-up where the gate failed."""
    what = f"GAD step {row['case']} {row['threads']} thread{'s' * (row['threads'] > 1)} beside {row['opponent']}"
    if row["gate"] != "pass":
        return f"{what}: GATE FAILED, no timing shown (errors above {row['tolerance']:g}? {row['error']})"
    memory = "" if row["memory_ratio"] is None else f", memory x{row['memory_ratio']:.2f}"
    alone = "" if row.get("schedule_alone") is None else f", the schedule alone x{row['schedule_alone']['ratio']:.2f}"
    return (
        f"{what}: {row['ours']['median_s']:.2f} s, theirs {row['theirs']['median_s']:.2f} s: x{row['ratio']:.2f} "
        f"(without sampling x{row['ratio_without_sampling']:.2f}){alone}{memory}, "
        f"{row['limit']['share']['step']:.0%} of the product limit"
    )
