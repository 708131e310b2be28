"""One side of the suite `adapters`: takes GAD steps on command, its phases on the clock, the peak of each noted.

python -m bench.adapters.side PROBLEM THREADS RANK        RANK 0: all weights are trained
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import peak
from bench.step.ours import check_lengths, engine_of, requests, timed_sampler
from bench.step.problem import Problem
from bench.step.worker import Channel, Clock, Meter, serve
from gadcore import cpu
from gadcore.config.settings import DiscriminatorSettings, StudentSettings
from gadcore.models.discriminator import Discriminator
from gadcore.models.spec import ModelSpec
from gadcore.models.student import Student


class Phases(Clock):
    """A clock that notes the most that was resident in every phase. Phases do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.peaks: dict[str, int] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        peak.give_back()
        measurable = peak.reset_peak()
        with super().__call__(phase):
            yield
        if measurable:
            self.peaks[phase] = max(self.peaks.get(phase, 0), peak.resident("VmHWM"))


class Side:
    """What a run builds for the GAD stage, with adapters of a rank on one base, or without."""

    def __init__(self, problem: Problem, rank: int, clock: Phases) -> None:
        cpu.install()
        config = problem.config()
        self.problem, self.clock = problem, clock
        spec = ModelSpec.resolve(problem.student)
        adapter: dict[str, Any] = {"adapter": "lora", "adapter_rank": rank} if rank else {}
        tokens = config.schedule.micro_batch_tokens
        common: dict[str, Any] = dict(device="cpu", seed=0, micro_batch_tokens=tokens)
        self.student = Student.load(
            spec, StudentSettings(**adapter), config.algorithm, temperature=problem.temperature, **common
        )
        self.discriminator = Discriminator.load(
            spec, DiscriminatorSettings(**adapter), student=spec, base=self.student.base, **common
        )
        self.student.optimizer.allocate()
        self.discriminator.optimizer.allocate()
        self.engine = engine_of(problem, self.student.model)
        self.sampler = timed_sampler(problem, self.engine, self.student.model, clock)
        self.student.freeze_reference()

    def step(self, number: int) -> dict[str, Any]:
        clock, problem, student = self.clock, self.problem, self.student
        clock.peaks.clear()
        groups = problem.batch(number)
        drawn = self.sampler.generate(requests(groups, problem.samples, number))
        self.engine.sleep()
        for group, samples in zip(groups, drawn, strict=True):
            group.samples = samples
        with clock("discriminator"):
            scores = self.discriminator.score(groups, backward=True)
        with clock("discriminator update"):
            self.discriminator.step()
        with clock("reference"):
            reference = student.reference_logprobs(groups)
        with clock("student"):
            student.grpo_backward(groups, scores.sample_scores, reference)
        with clock("student update"):
            student.step()
        return {"response_tokens": check_lengths(problem, groups), "peaks": dict(clock.peaks)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("problem", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("rank", type=int)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    channel, clock = Channel(), Phases()
    side = Side(Problem.read(options.problem), options.rank, clock)
    models = [side.student.model, side.discriminator.model]
    serve(channel, Meter(clock, options.threads, *models), lambda number, _: side.step(number))


if __name__ == "__main__":
    main()
