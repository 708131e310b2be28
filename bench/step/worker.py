"""What the processes of the suite `step` have in common: the line to the suite, the clock by phases, the meter.

The suite writes a command a line: "step", "check" (a step that also leaves its rollouts and gradients behind),
"profile" (a step whose operations are timed) or "peak" (the rate of a large matrix product); a side answers each with
one line of JSON, after a first one when it is ready. At the end of its input it ends.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import peak
from bench.step.problem import Problem
from gadcore.kernels.cpu.linear import linear

# 17 GFLOP a product, 16 MiB a matrix: larger ones run no faster.
PEAK_SIZE = 2048
PEAK_REPEATS = 4

# Operations of a profile that are told by name.
LONGEST = 20

# Added to the standard deviation of a group's rewards in the advantages, by gadcore and by the paper's code.
EPSILON = 1e-6


class Channel:
    """Answers go to the suite alone: whatever a library prints goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def tell(self, answer: Any) -> None:
        self._out.write(json.dumps(answer, allow_nan=False) + "\n")

    def wait(self) -> str:
        """The next command; "" at the end. Answers "peak" by itself."""
        while (command := sys.stdin.readline().strip()) == "peak":
            self.tell({"flops_per_s": product_rate()})
        return command


def product_rate() -> float:
    """FLOP/s of the fastest of a few large fp32 matrix products: by CPU time on one thread, by the wall on more.

    Of those of both libraries that torch holds, MKL and oneDNN.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    a, b = torch.randn(2, PEAK_SIZE, PEAK_SIZE)
    seconds = []
    for impl in ("reference", "cpu"):
        linear(a, b, impl=impl)
        for _ in range(PEAK_REPEATS):
            start = clock()
            linear(a, b, impl=impl)
            seconds.append(clock() - start)
    return 2 * PEAK_SIZE**3 / min(seconds)


class Clock:
    """CPU and wall seconds by phase. Phases may nest: time counts for the innermost one, "other" outside all."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = defaultdict(float)
        self.wall: dict[str, float] = defaultdict(float)
        self._phases = ["other"]
        self._mark = time.process_time(), time.perf_counter()

    def reset(self) -> None:
        self.cpu.clear()
        self.wall.clear()
        self._mark = time.process_time(), time.perf_counter()

    def lap(self) -> None:
        """Books the time since the last mark on the phase that is open."""
        now = time.process_time(), time.perf_counter()
        self.cpu[self._phases[-1]] += now[0] - self._mark[0]
        self.wall[self._phases[-1]] += now[1] - self._mark[1]
        self._mark = now

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.lap()
        self._phases.append(phase)
        try:
            yield
        finally:
            self.lap()
            self._phases.pop()

    def wrap(self, owner: Any, method: str, phase: Callable[..., str]) -> None:
        """Books calls of owner.method on a phase; phase: its name from the arguments."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(phase(*args, **kwargs)):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)


class Meter:
    """Time and memory of a step, begun and ended."""

    def __init__(self, clock: Clock, threads: int, *loaded: nn.Module) -> None:
        """loaded: all models of the process."""
        self.clock = clock
        self.threads = threads
        # Weights mapped from a file are resident once they were read.
        for p in [p for model in loaded for p in model.parameters()]:
            p.detach().sum()
        gc.collect()
        peak.give_back()
        self.loaded = peak.resident("VmRSS")
        self._measurable = False

    def begin(self) -> None:
        gc.collect()
        # Both sides of a pair stay alive, so what a step has freed is given back before the other's turn.
        peak.give_back()
        self._measurable = peak.reset_peak()
        self.clock.reset()

    def end(self) -> dict[str, Any]:
        self.clock.lap()
        highest = peak.resident("VmHWM") if self._measurable else None
        if torch.get_num_threads() != self.threads:
            raise RuntimeError(f"PyTorch computes with {torch.get_num_threads()} threads, should with {self.threads}")
        answer = {
            "cpu": dict(self.clock.cpu),
            "wall": dict(self.clock.wall),
            "peak_bytes": highest,
            "loaded_bytes": self.loaded,
        }
        gc.collect()
        peak.give_back()
        return answer


@dataclass(frozen=True)
class Arguments:
    problem: Problem
    threads: int
    # Where "check" leaves what it found.
    findings: Path


def arguments() -> Arguments:
    parser = argparse.ArgumentParser()
    parser.add_argument("problem", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("findings", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return Arguments(Problem.read(options.problem), options.threads, options.findings)


def write_findings(
    path: Path,
    *,
    groups: list[dict[str, Any]],
    rewards: list[list[float]],
    losses: dict[str, float],
    student: nn.Module,
    discriminator: nn.Module | dict[str, Tensor],
    epsilon: float = EPSILON,
) -> None:
    """What bench.step.gate checks.

    groups: per prompt {prompt, samples} in the student's tokens, {d_prompt, d_responses} in D's, teacher first.
    losses: "policy" and "discriminator". student, discriminator: with the gradients of the step, not clipped.
    epsilon: what the side adds to the deviation of a group's rewards.
    """
    gradients = {"student": gradients_of(student)}
    gradients["discriminator"] = discriminator if isinstance(discriminator, dict) else gradients_of(discriminator)
    found = {"groups": groups, "rewards": rewards, "losses": losses, "gradients": gradients, "epsilon": epsilon}
    torch.save(found, path)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


# One step: the step's number, whether to leave findings; returns what is added to the answer.
Step = Callable[[int, bool], dict[str, Any]]


def serve(channel: Channel, meter: Meter, step: Step) -> None:
    """Takes steps on command until the input ends."""
    channel.tell({"ready": True})
    number = 0
    while command := channel.wait():
        meter.begin()
        if command == "profile":
            answer: dict[str, Any] = {"profile": profile_of(partial(step, number, False))}
        else:
            answer = step(number, command == "check")
        channel.tell({**meter.end(), **answer})
        number += 1


def profile_of(call: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of a call, and of its longest operations without those that they call: [name, seconds, calls]. All by the
    wall clock, by which the profiler counts: CPU seconds would be fewer where others compute as well."""
    start = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
        seconds = time.perf_counter() - start
    found = [[e.key, e.self_cpu_time_total / 1e6, e.count] for e in profile.key_averages()]
    found.sort(key=lambda operation: -operation[1])
    rest = found[LONGEST:]
    others = [["other operations", sum(o[1] for o in rest), sum(o[2] for o in rest)]] if rest else []
    return {"seconds": seconds, "operations": found[:LONGEST] + others}
