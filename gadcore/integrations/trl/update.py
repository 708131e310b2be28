"""One optimizer step of the discriminator from groups that come in several calls and on several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from gadcore.data.groups import Group
from gadcore.models.discriminator import Discriminator

FIGURES = ("loss", "accuracy", "margin")


@dataclass(frozen=True)
class Found:
    """rewards: of every group, D(x, y_s^i). teacher_scores: of every group. figures: loss, accuracy and margin, means
    over the pairs of all groups."""

    rewards: list[list[float]]
    teacher_scores: list[float]
    figures: dict[str, float]


class Update:
    """Gradients of groups, summed until step(), as one mean over all of their pairs.

    Every rank gives all groups and computes its share of them; after step() the weights of all ranks are equal.
    groups, pairs: that wait for step().
    """

    def __init__(self, discriminator: Discriminator) -> None:
        self.discriminator = discriminator
        self.groups = self.pairs = 0
        # Pairs that this rank's gradient is a mean over.
        self._own = 0

    def add(self, groups: Sequence[Group], *, backward: bool) -> Found:
        """Scores groups under the weights as they are; with `backward` their gradient waits for step()."""
        rank, size = ranks()
        mine = list(range(rank, len(groups), size))
        pairs = sum(len(groups[i].samples) for i in mine)
        scores = None
        if mine:
            if backward:
                self._scale(self._own / pairs)
            scores = self.discriminator.score([groups[i] for i in mine], backward=backward)
            if backward:
                self._own += pairs
                self._scale(pairs / self._own)
        if backward:
            self.groups += len(groups)
            self.pairs += sum(len(group.samples) for group in groups)
        share = None
        if scores is not None:
            figures = {name: getattr(scores, name) for name in FIGURES}
            share = (mine, scores.rewards, scores.teacher_scores, figures, pairs)
        return _together([part for part in gathered(share) if part is not None], len(groups))

    def step(self) -> float:
        """One optimizer step on what waits; the gradient's norm before clipping. UserError where it is not finite."""
        _, size = ranks()
        if size > 1:
            self._average()
        self.groups = self.pairs = self._own = 0
        return self.discriminator.step()

    def _scale(self, factor: float) -> None:
        """Of the gradients that are there; 0 where none is yet, and 1 for the first groups, which changes nothing."""
        if factor in (0, 1):
            return
        for parameter in self.discriminator.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    @torch.no_grad()
    def _average(self) -> None:
        for parameter in self.discriminator.model.parameters():
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.mul_(self._own / self.pairs)
            dist.all_reduce(parameter.grad)


def ranks() -> tuple[int, int]:
    """(rank, number of ranks) of torch.distributed, (0, 1) without it."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(share: Any) -> list[Any]:
    """What every rank gives, by rank."""
    _, size = ranks()
    if size == 1:
        return [share]
    shares: list[Any] = [None] * size
    dist.all_gather_object(shares, share)
    return shares


def _together(shares: Sequence[Any], groups: int) -> Found:
    rewards: list[list[float]] = [[] for _ in range(groups)]
    teachers = [0.0] * groups
    everything = sum(pairs for *_, pairs in shares)
    figures = dict.fromkeys(FIGURES, 0.0)
    for indices, its_rewards, its_teachers, its_figures, pairs in shares:
        for place, index in enumerate(indices):
            rewards[index], teachers[index] = its_rewards[place], its_teachers[place]
        for name in FIGURES:
            # Exactly the figure where there is one share: nothing is multiplied and divided again.
            figures[name] += its_figures[name] * (pairs / everything)
    return Found(rewards, teachers, figures)
