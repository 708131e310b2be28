"""What the probe of the sampler asks the trainer: log-probs of a few samples, computed in full by every process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from gadcore.config.settings import Config
from gadcore.data.groups import Group, GroupedBatch, GroupTokens
from gadcore.models.student import Student
from gadcore.rollout.engine import Engine
from gadcore.rollout.probe import Probe


def probe_of(config: Config, engine: Engine, student: Student) -> Probe | None:
    """The probe that the settings ask for; None for an engine that computes with the trainer's own weights."""
    every = config.rollout.probe_every
    if engine.shared or not every:
        return None
    return Probe(partial(sampled_logprobs, student), every=every, dtype=engine.dtype(config))


def sampled_logprobs(student: Student, groups: Sequence[Group]) -> list[list[Tensor]]:
    """Per group and sample the log-probs [tokens] of its tokens, at the temperature of sampling, in every process.

    One group at a time, in the same order everywhere: a sharded model gathers for all.
    """
    found = []
    for group in groups:
        tokens = GroupTokens(group.prompt.token_ids, tuple(sample.token_ids for sample in group.samples))
        batch = GroupedBatch.of([tokens], last_tokens=False, device=student.model.device)
        logprobs = student.logprobs(student.model, batch, student.temperature)
        found.append(list(logprobs.split(list(batch.lengths))))
    return found
