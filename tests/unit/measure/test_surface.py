"""Baselines of the surface, calibration, saturation, reward noise: against figures by hand and known answers."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from gadcore.config.settings import FreshSettings
from gadcore.measure.noise import reward_noise
from gadcore.measure.reliability import calibration, saturation
from gadcore.measure.surface import Pairs, Side, accuracy_of, baselines, lean


def pairs(teacher, student, count: int = 60, samples: int = 2, *, seed: int = 0) -> list[Pairs]:
    rng = random.Random(seed)
    return [Pairs(teacher(rng), tuple(student(rng) for _ in range(samples))) for _ in range(count)]


def noun(rng: random.Random) -> str:
    return rng.choice("abcdef")


def test_each_surface_sees_its_own_difference_alone() -> None:
    def plain(rng: random.Random) -> Side:
        return Side(f"{noun(rng)} {noun(rng)} {noun(rng)} {noun(rng)}.", True)

    students = {
        "length": lambda rng: Side(plain(rng).text * 2, True),
        "end marker": lambda rng: Side(plain(rng).text, False),
        "first word": lambda rng: Side("x " + plain(rng).text[2:], True),
        "last word": lambda rng: Side(plain(rng).text[:-1] + "!", True),
        "bag of words": lambda rng: Side(f"{noun(rng)} y {noun(rng)} {noun(rng)}.", True),
    }
    for name, student in students.items():
        found = {key: made.accuracy for key, made in baselines(pairs(plain, student)).items()}
        assert found[name].mean == 1.0 and found[name].n == 60, name
        blind = set(students) - {name} - ({"bag of words"} if name == "first word" else set())
        # Two texts run into one give other words too.
        blind -= {"bag of words"} if name == "length" else set()
        assert all(found[other].low < 0.55 for other in blind), (name, found)


def test_a_length_between_too_short_and_too_long_is_seen() -> None:
    def student(rng: random.Random) -> Side:
        return Side("a " * rng.choice([2, 3, 40, 50]), True)

    found = baselines(pairs(lambda rng: Side("a " * rng.randint(9, 12), True), student))
    assert found["length"].accuracy.mean > 0.95


def test_prompts_that_were_fitted_on_are_never_scored() -> None:
    """Words that each prompt has for itself tell everything of it, and nothing of another one."""
    own = [Pairs(Side(f"teacher{i}", True), (Side(f"student{i}", True),)) for i in range(40)]
    assert baselines(own)["bag of words"].accuracy.mean == 0.5
    assert baselines(own[:7]) == {}


def test_accuracy_is_a_mean_over_prompts() -> None:
    found = accuracy_of([[1.0, 1.0, 1.0, -1.0], [0.0], [-2.0, 3.0]])
    assert found.mean == pytest.approx((0.75 + 0.5 + 0.5) / 3) and found.n == 3


def test_lean_is_measured_inside_prompts() -> None:
    sides = (Side("a", True), Side("a b", True), Side("a b c", True))
    up = [Pairs(sides[0], sides, 0.0, (level + 1.0, level + 2.0, level + 3.0)) for level in (0, -50, 9)]
    size = lambda side: float(len(side.text.split()))  # noqa: E731
    assert lean(up, size) == pytest.approx(1.0)
    assert lean([Pairs(sides[0], sides[:1], 0.0, (1.0,))] * 3, size) is None
    assert lean([Pairs(sides[0], sides, 0.0, (1.0, 1.0, 1.0))], size) is None


def test_calibration_finds_the_temperature_that_was_put_in() -> None:
    rng = np.random.default_rng(0)
    # Of a pair the surer side is right as often as it is sure.
    sure = np.abs(rng.normal(0, 2, 20_000))
    margins = np.where(rng.random(20_000) < 1 / (1 + np.exp(-sure)), sure, -sure)
    honest, hot = calibration(margins.tolist()), calibration((4 * margins).tolist())
    assert honest.temperature == pytest.approx(1, abs=0.05) and honest.error < 0.02
    assert hot.temperature == pytest.approx(4, abs=0.2) and hot.error > 0.1 and hot.nll > honest.nll
    assert honest.nll == pytest.approx(np.logaddexp(0, -margins).mean())
    assert calibration([1.0, 2.0]).temperature == 0 and calibration([-1.0, -2.0]).temperature > 1000


def test_saturation_by_hand() -> None:
    found = saturation([2.0, 0.0], [[0.0, 1.0], [0.0, 0.0]])
    weights = [1 / (1 + math.exp(m)) for m in (2.0, 1.0, 0.0, 0.0)]
    assert found.weight == pytest.approx(sum(weights) / 4) and found.margin == 0.75
    assert found.spread == pytest.approx(math.sqrt(0.5) / 2) and found.flat == 0.5
    assert saturation([1.0], [[0.0]]).spread is None


class Seeded:
    """A discriminator that gives a sample `signal` times its value, and noise of its own seed."""

    def __init__(self, seed: int, signal: float) -> None:
        self.rng, self.signal, self.steps = np.random.default_rng(seed), signal, 0
        self.trained: set[int] = set()

    def score(self, groups, *, backward):
        if backward:
            self.trained |= {g[0] for g in groups}
        else:
            assert not self.trained & {g[0] for g in groups}
        found = [[self.signal * value + self.rng.normal() for value in g[1]] for g in groups]
        return type("Scores", (), {"rewards": found, "teacher_scores": [0.0] * len(groups)})

    def step(self) -> float:
        self.steps += 1
        return 0.0


@pytest.mark.parametrize(("signal", "low", "high"), [(0.0, -0.15, 0.15), (1.0, 0.35, 0.65), (20.0, 0.98, 1.0)])
def test_reward_noise_is_what_seeds_do_not_share(signal, low, high) -> None:
    rng, made = np.random.default_rng(1), []
    groups = [(i, rng.normal(size=4).tolist()) for i in range(400)]

    def make(seed: int) -> Seeded:
        made.append(Seeded(seed, signal))
        return made[-1]

    found = reward_noise(groups, make, FreshSettings(steps=3, batch_size=16))
    assert found is not None and low <= found <= high
    assert [d.steps for d in made] == [3, 3]
    assert reward_noise([(0, [1.0, 1.0]), (1, [1.0, 1.0])], lambda seed: Flat(), FreshSettings(steps=1)) is None


class Flat:
    def score(self, groups, *, backward):
        return type("Scores", (), {"rewards": [[1.0] * len(g[1]) for g in groups], "teacher_scores": []})

    def step(self) -> float:
        return 0.0
