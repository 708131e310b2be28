"""Trainer: what its schedule and its seeds depend on."""

from __future__ import annotations

import pytest

from gadcore.config import Config, ScheduleSettings
from gadcore.trainer import derived_seed, stage_steps


@pytest.mark.parametrize(
    ("schedule", "stages", "expected"),
    [
        ({}, ["warmup", "gad"], {"warmup": 7, "gad": 14}),
        ({"gad_steps": 5}, ["warmup", "gad"], {"warmup": 7, "gad": 5}),
        ({"gad_steps": 500}, ["warmup", "gad"], {"warmup": 7, "gad": 14}),
        ({"warmup_steps": 0, "gad_epochs": 0}, ["warmup", "gad"], {"warmup": 0, "gad": 0}),
        ({"warmup_epochs": 0, "warmup_steps": 9}, ["warmup"], {"warmup": 0}),
        ({"seqkd_epochs": 2, "gad_steps": 1}, ["seqkd"], {"seqkd": 14}),
    ],
)
def test_steps_of_a_stage(schedule: dict[str, int], stages: list[str], expected: dict[str, int]) -> None:
    config = Config(schedule=ScheduleSettings(**schedule))
    steps = stage_steps(config, stages, steps_per_epoch=7)
    assert steps == expected and list(steps) == stages


def test_a_seed_is_the_same_in_every_process() -> None:
    """A resumed run draws the same samples only while these values stay what they are."""
    assert derived_seed(0, "gad/1", 0) == 214570541580281
    assert derived_seed(7, "evaluation", 12) == 43433807096802


def test_a_seed_depends_on_every_argument() -> None:
    arguments = [(s, p, i) for s in (0, 1, 11) for p in ("gad/1", "gad/11", "warmup/1", "") for i in (0, 1, 10, 110)]
    seeds = [derived_seed(*each) for each in arguments]
    assert len(set(seeds)) == len(arguments)
    assert all(0 <= seed < 2**48 for seed in seeds)
