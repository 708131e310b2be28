"""Interleaved timing of callables that do the same work."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

# seconds a call takes, over a number of calls in a row
Clock = Callable[[Callable[[], object], int], float]

# A sample shorter than this says more about the clock and the scheduler than about the call.
SAMPLE_S = 0.01
MOST_CALLS = 1000


def nothing() -> None:
    """No preparation."""


@dataclass(frozen=True)
class Side:
    """One of the callables that are compared.

    call: does the work and returns its outputs by name. prepare: run before every sample, outside the timing; where a
    side has one, a sample is one call. compiled: its first call compiles. limit: a bound that computes no result, so
    it has no outputs to check, and its memory is not measured.
    """

    name: str
    call: Callable[[], dict[str, Tensor]]
    prepare: Callable[[], None] = nothing
    compiled: bool = False
    limit: bool = False


@dataclass(frozen=True)
class Rounds:
    """How many rounds: as many as fit into `seconds`, but at least `least` and at most `most`."""

    least: int
    most: int
    seconds: float

    def within(self, round_s: float) -> int:
        return max(self.least, min(self.most, int(self.seconds / max(round_s, 1e-9))))


def wall(call: Callable[[], object], calls: int) -> float:
    """Seconds of wall time a call."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def order(sides: Sequence[Side], round_index: int) -> list[Side]:
    """The order of a round: every side goes first in turn, and every other round runs backwards."""
    shift = (round_index // 2) % len(sides)
    turned = [*sides[shift:], *sides[:shift]]
    return turned[::-1] if round_index % 2 else turned


def interleave(
    sides: Sequence[Side], rounds: Rounds, clock: Clock = wall, *, sample_s: float = SAMPLE_S
) -> dict[str, list[float]]:
    """Seconds a call of every side in every round, by name. Every side must be warm already."""
    if len({side.name for side in sides}) != len(sides):
        raise ValueError(f"sides need different names, have {[side.name for side in sides]}")
    with _without_collector():
        first = {side.name: _sample(side, clock, 1) for side in sides}
        calls = {side.name: _calls(side, first[side.name], sample_s) for side in sides}
        runs: dict[str, list[float]] = {side.name: [] for side in sides}
        # A long first sample is a full measurement; a short one only told how many calls make up a sample.
        if all(n == 1 for n in calls.values()):
            runs = {name: [seconds] for name, seconds in first.items()}
        count = rounds.within(sum(first[name] * calls[name] for name in first))
        for index in range(len(runs[sides[0].name]), count):
            for side in order(sides, index):
                runs[side.name].append(_sample(side, clock, calls[side.name]))
    return runs


def _calls(side: Side, seconds: float, sample_s: float) -> int:
    if side.prepare is not nothing:
        return 1
    return max(1, min(MOST_CALLS, math.ceil(sample_s / max(seconds, 1e-9))))


def _sample(side: Side, clock: Clock, calls: int) -> float:
    gc.collect()
    side.prepare()
    return clock(side.call, calls)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Python's garbage collector runs between samples only, over what they left."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
