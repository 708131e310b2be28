"""The fresh-discriminator two-sample test: can a discriminator that never met the student tell it from its teacher?

A new discriminator is trained by the Bradley-Terry loss on (teacher, student) pairs of one half of the prompts and
scores the pairs of the other half. Accuracy .5 means that it finds nothing that tells them apart, 1 that it always
does. Unlike the accuracy of the discriminator that trains beside the student, it is not moved by their race, so it can
be compared between models and over time. It is a lower bound: a stronger discriminator, or one with more pairs to
learn from, may find more.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol, TypeVar

import numpy as np

from gadcore.config.settings import FreshSettings
from gadcore.measure.intervals import wilson

GroupT = TypeVar("GroupT")
GroupT_contra = TypeVar("GroupT_contra", contravariant=True)


class ScoresLike(Protocol):
    """rewards: per group, the scores of its samples. teacher_scores: per group, the score of the teacher's text."""

    @property
    def rewards(self) -> Sequence[Sequence[float]]: ...
    @property
    def teacher_scores(self) -> Sequence[float]: ...


class DiscriminatorLike(Protocol[GroupT_contra]):
    """What the test asks of a discriminator; models.discriminator.Discriminator is one, over data.groups.Group."""

    def score(self, groups: Sequence[GroupT_contra], *, backward: bool) -> ScoresLike:
        """Scores every response; with `backward` the gradient of the mean BT loss over all pairs is added."""
        ...

    def step(self) -> float:
        """One optimizer step on the gradient that score() left."""
        ...


@dataclass(frozen=True)
class FreshResult:
    """accuracy: share of pairs in which the teacher's text has the higher score, a tie counting one half; the mean
    over prompts. interval: Wilson's, with the prompts as trials. margin: mean of teacher's score - sample's score.
    n: prompts scored. train_accuracy: the same on the prompts that were trained on, after training: near 1 beside a
    low accuracy, the discriminator learned its pairs by heart. steps: per discriminator.
    tested: positions of the groups scored, ascending. correct: their accuracies, in this order.
    """

    accuracy: float
    interval: tuple[float, float]
    margin: float
    n: int
    train_accuracy: float
    steps: int
    tested: tuple[int, ...]
    correct: tuple[float, ...]


def fresh_discriminator(
    groups: Sequence[GroupT],
    make_discriminator: Callable[[], DiscriminatorLike[GroupT]],
    settings: FreshSettings,
) -> FreshResult:
    """Trains new discriminators on halves of the groups and scores the other halves.

    groups: prompts with the teacher's text and the student's samples, at least two, each group another prompt: pairs of
      one prompt in both halves would let the discriminator remember them. One sample is enough.
    make_discriminator: gives an untrained discriminator, equal ones on every call for a result that can be repeated.

    The halves depend on settings.seed and the number of groups alone: results of several models over the same prompts
    are paired. With settings.cross_fit each half is trained on once, by a discriminator of its own, and every prompt is
    scored, by the one that did not see it; without, the smaller half (if any) is trained on and the other one scored.
    The interval covers the choice of prompts to score, not the chance in training the discriminator.

    Raises ValueError for fewer than two groups.
    """
    if len(groups) < 2:
        raise ValueError(f"{len(groups)} groups cannot be cut into two halves")
    order = np.random.default_rng(settings.seed).permutation(len(groups)).tolist()
    half = len(order) // 2
    folds = [(order[:half], order[half:])]
    if settings.cross_fit:
        folds.append((order[half:], order[:half]))
    correct: dict[int, float] = {}
    margins: list[float] = []
    trained: list[float] = []
    for fold, (train, test) in enumerate(folds):
        discriminator = make_discriminator()
        for batch in batches(train, settings, fold):
            discriminator.score([groups[i] for i in batch], backward=True)
            discriminator.step()
        scored = [_scored(discriminator, [groups[i] for i in part], settings.batch_size) for part in (train, test)]
        trained += [accuracy for accuracy, _ in scored[0]]
        correct |= {i: accuracy for i, (accuracy, _) in zip(test, scored[1], strict=True)}
        margins += [margin for _, margin in scored[1]]
        # A model with its hooks is a cycle: left to itself, it and its optimizer stay beside the next ones.
        del discriminator
        gc.collect()
    tested = tuple(sorted(correct))
    values = tuple(correct[i] for i in tested)
    found = wilson(fmean(values), len(values))
    return FreshResult(
        accuracy=found.mean,
        interval=(found.low, found.high),
        margin=fmean(margins),
        n=found.n,
        train_accuracy=fmean(trained),
        steps=settings.steps,
        tested=tested,
        correct=values,
    )


def batches(items: Sequence[int], settings: FreshSettings, fold: int) -> Iterator[list[int]]:
    """settings.steps batches, the items shuffled anew each time that they are used up."""
    generator = np.random.default_rng([settings.seed, fold])
    left: list[int] = []
    for _ in range(settings.steps):
        if not left:
            left = generator.permutation(np.asarray(items)).tolist()
        yield left[: settings.batch_size]
        left = left[settings.batch_size :]


def _scored(
    discriminator: DiscriminatorLike[GroupT], groups: Sequence[GroupT], batch_size: int
) -> list[tuple[float, float]]:
    """(accuracy, mean margin) of every group."""
    found = []
    for start in range(0, len(groups), batch_size):
        scores = discriminator.score(groups[start : start + batch_size], backward=False)
        for teacher, rewards in zip(scores.teacher_scores, scores.rewards, strict=True):
            accuracy = fmean(1.0 if teacher > r else 0.5 if teacher == r else 0.0 for r in rewards)
            found.append((accuracy, fmean(teacher - r for r in rewards)))
    return found
