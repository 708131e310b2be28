"""One comparison: correctness and memory first, then interleaved timing, one result an opponent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from bench.kernels.opponents.problem import Expected
from bench.record import Result, Timing, ratio_of
from bench.runner import Clock, Rounds, Side, interleave
from gadcore.kernels.dispatch import Impl

Direction = Literal["forward", "forward + backward"]
Outputs = dict[str, Tensor]

# Relative L2 error against fp64 that every output of both sides must keep.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Setup:
    """Where and how it is measured. peak: makes a call and returns its outputs and the bytes that it needed on top."""

    suite: str
    impl: Impl
    dtype: torch.dtype
    device: str
    threads: int
    clock: Clock
    peak: Callable[[Callable[[], Outputs]], tuple[Outputs, int | None]]
    # Sides that have been called in this process, whatever the size.
    warm: set[tuple[str, str, str]] = field(default_factory=set)


@dataclass(frozen=True)
class KernelCase:
    """An op of ours with opponents that take turns with it on the same inputs."""

    op: str
    direction: Direction
    shape: dict[str, int]
    ours: Side
    opponents: list[Side]
    expected: dict[str, Expected]
    rounds: Rounds
    config: dict[str, Any] = field(default_factory=dict)
    # Where it is not the setup's.
    dtype: torch.dtype | None = None


def measure(case: KernelCase, setup: Setup) -> list[Result]:
    """Raises whatever a side raises: a comparison that cannot be made must not look like one that was not wanted."""
    sides = [case.ours, *case.opponents]
    checked = {side.name: _first_calls(side, case, setup) for side in sides}
    runs = interleave(sides, case.rounds, setup.clock)
    timing = {}
    for side in sides:
        peak_bytes, error, first_s = checked[side.name]
        timing[side.name] = Timing.of(runs[side.name], peak_bytes=peak_bytes, error=error, first_s=first_s)
    return [_result(case, setup, timing[case.ours.name], side, timing[side.name]) for side in case.opponents]


def _first_calls(side: Side, case: KernelCase, setup: Setup) -> tuple[int | None, dict[str, float], float | None]:
    """(peak_bytes, error, seconds of the call that compiled) of a side, which is warm afterwards."""
    first_s = None
    key = case.op, case.direction, side.name
    # The first call of all loads code and starts threads, whose memory is not the call's.
    if side.compiled or key not in setup.warm:
        side.prepare()
        seconds = setup.clock(side.call, 1)
        first_s = seconds if side.compiled else None
        setup.warm.add(key)
    if side.limit:
        return None, {}, first_s
    side.prepare()
    outputs, peak_bytes = setup.peak(side.call)
    error = {name: expected.error(outputs[name]) for name, expected in case.expected.items()}
    outputs.clear()
    side.prepare()
    return peak_bytes, error, first_s


def _result(case: KernelCase, setup: Setup, ours: Timing, side: Side, theirs: Timing) -> Result:
    dtype = case.dtype or setup.dtype
    tolerance = TOLERANCE[dtype]
    # `<=` so that nan fails.
    passed = all(error <= tolerance for timing in (ours, theirs) for error in timing.error.values())
    return Result(
        suite=setup.suite,
        op=case.op,
        impl=setup.impl,
        opponent=side.name,
        direction=case.direction,
        shape=case.shape,
        dtype=str(dtype).removeprefix("torch."),
        threads=setup.threads,
        ours=ours,
        theirs=theirs,
        ratio=ratio_of(ours.runs, theirs.runs),
        gate="pass" if passed else "fail",
        tolerance=tolerance,
        config=case.config,
    )


def line(result: Result) -> str:
    """A result for the terminal; without a speed-up where the gate failed."""
    shape = " ".join(f"{name}={size}" for name, size in result.shape.items())
    what = f"{result.op} {result.direction} {shape} {result.threads} thread{'s' * (result.threads > 1)}"
    if result.speed_up is None:
        errors = {"ours": result.ours.error, result.opponent: result.theirs.error}
        return f"{what}: GATE FAILED, no timing shown (errors above {result.tolerance:g}? {errors})"
    return (
        f"{what}: {result.ours.median_s * 1e3:.3f} ms, {result.opponent} {result.theirs.median_s * 1e3:.3f} ms: "
        f"x{result.speed_up:.2f}"
    )
