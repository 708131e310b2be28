"""The fresh-discriminator test on pairs of numbers: what it must find is known."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field

import numpy as np
import pytest

from gadcore.config.settings import FreshSettings
from gadcore.measure.fresh import fresh_discriminator


@dataclass
class Pair:
    """A prompt's number, the teacher's point and the student's points in the plane."""

    prompt: int
    teacher: np.ndarray
    samples: list[np.ndarray]


@dataclass
class Scored:
    rewards: list[list[float]]
    teacher_scores: list[float]


@dataclass
class Linear:
    """score = w . y, trained by Bradley-Terry; remembers what it was asked about."""

    lr: float = 0.5
    w: np.ndarray = field(default_factory=lambda: np.zeros(2))
    gradient: np.ndarray = field(default_factory=lambda: np.zeros(2))
    trained: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    steps: int = 0

    def score(self, groups, *, backward):
        (self.trained if backward else self.asked).extend(g.prompt for g in groups)
        pairs = [g.teacher - s for g in groups for s in g.samples]
        if backward:
            for d in pairs:
                self.gradient = self.gradient - d / (1 + np.exp(self.w @ d)) / len(pairs)
        return Scored(
            [[float(self.w @ s) for s in g.samples] for g in groups], [float(self.w @ g.teacher) for g in groups]
        )

    def step(self):
        self.w, self.gradient = self.w - self.lr * self.gradient, np.zeros(2)
        self.steps += 1
        return 0.0


class Parrot(Linear):
    """Knows by heart which text of the pairs that it was trained on is the teacher's; other pairs are all alike."""

    def score(self, groups, *, backward):
        (self.trained if backward else self.asked).extend(g.prompt for g in groups)
        return Scored(
            [[0.0] * len(g.samples) for g in groups], [1.0 if g.prompt in self.trained else 0.0 for g in groups]
        )


def pairs(count: int, shift: float, seed: int = 0, samples: int = 1) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [Pair(i, rng.normal(size=2) + shift, [rng.normal(size=2) for _ in range(samples)]) for i in range(count)]


def run(groups, make=Linear, **settings):
    made = []

    def maker():
        made.append(make())
        return made[-1]

    return fresh_discriminator(groups, maker, FreshSettings(**{"steps": 30, "batch_size": 8, **settings})), made


def test_equal_distributions_cannot_be_told_apart() -> None:
    result, _ = run(pairs(400, shift=0.0))
    assert result.interval[0] < 0.5 < result.interval[1]
    assert result.interval[1] - result.interval[0] < 0.11


def test_the_accuracy_is_the_best_linear_discriminators() -> None:
    result, _ = run(pairs(2000, shift=1.0, seed=1), steps=100, batch_size=64)
    # P(w . (teacher - sample) > 0) with teacher - sample ~ N((1, 1), 2 I) and w along (1, 1): Phi(1).
    assert result.accuracy == pytest.approx(0.8413, abs=0.025)
    assert result.margin > 0 and result.n == 2000 and result.steps == 100


def test_pairs_learned_by_heart_do_not_count() -> None:
    result, _ = run(pairs(40, shift=0.0), Parrot)
    assert (result.accuracy, result.train_accuracy, result.margin) == (0.5, 1.0, 0.0)


def test_ties_count_one_half() -> None:
    same = [Pair(i, np.ones(2) * i, [np.ones(2) * i]) for i in range(10)]
    result, _ = run(same)
    assert result.accuracy == 0.5 and result.correct == (0.5,) * 10


def test_cross_fitting_scores_every_prompt_by_the_one_that_did_not_see_it() -> None:
    groups = pairs(11, shift=0.5)
    result, (first, second) = run(groups)
    assert result.tested == tuple(range(11)) and result.n == 11
    assert set(first.trained) | set(second.trained) == set(range(11))
    assert not set(first.trained) & set(second.trained)
    assert first.steps == second.steps == 30
    for one in (first, second):
        # Once each: those it was trained on for the train accuracy, the others for the result.
        assert sorted(one.asked) == list(range(11))
    for i, correct in enumerate(result.correct):
        scorer = second if i in first.trained else first
        assert correct == float(scorer.w @ (groups[i].teacher - groups[i].samples[0]) > 0)


def test_without_cross_fitting_one_half_is_scored() -> None:
    result, (only,) = run(pairs(11, shift=1.0), cross_fit=False)
    assert result.n == len(result.tested) == 6
    assert not set(result.tested) & set(only.trained)


def test_the_halves_depend_on_the_seed_and_the_count_alone() -> None:
    near, far, other = pairs(30, 0.0), pairs(30, 3.0), pairs(30, 0.0)
    halves = [run(groups, cross_fit=False, seed=s)[0].tested for groups, s in ((near, 0), (far, 0), (other, 1))]
    assert halves[0] == halves[1] != halves[2]


def test_it_repeats_itself() -> None:
    assert run(pairs(30, 0.5))[0] == run(pairs(30, 0.5))[0]


def test_several_samples_of_a_prompt_are_one_trial() -> None:
    result, _ = run(pairs(50, shift=0.5, samples=4))
    assert result.n == 50
    assert all(value in (0, 0.25, 0.5, 0.75, 1) for value in result.correct) and len(set(result.correct)) > 2


def test_one_prompt_has_no_halves() -> None:
    with pytest.raises(ValueError, match="two halves"):
        run(pairs(1, 0.0))


def test_a_discriminator_is_gone_when_the_next_one_is_made() -> None:
    """Models refer to themselves through their hooks; two of them with their optimizers once filled a machine."""
    alive: list[weakref.ref[Linear]] = []

    def make() -> Linear:
        assert all(ref() is None for ref in alive)
        made = Linear()
        made.itself = made  # type: ignore[attr-defined]
        alive.append(weakref.ref(made))
        return made

    gc.disable()
    try:
        fresh_discriminator(pairs(40, 1.0), make, FreshSettings(steps=2, batch_size=8, cross_fit=True))
    finally:
        gc.enable()
    assert len(alive) == 2 and alive[1]() is None
