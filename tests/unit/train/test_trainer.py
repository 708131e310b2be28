"""Trainer: what its schedule and its seeds depend on."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from gadcore.config.settings import AlgorithmSettings, Config, GateSettings, ScheduleSettings
from gadcore.errors import UserError
from gadcore.rollout.sampler import derived_seed
from gadcore.train.convergence import Convergence
from gadcore.train.gate import Gate
from gadcore.train.progress import Progress, stage_steps


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


@pytest.mark.parametrize(
    ("algorithm", "schedule", "wrong"),
    [
        ({"critic_warmup": 7}, {}, "algorithm.critic_warmup = 7 covers all 7 steps"),
        ({"critic_warmup": 6}, {}, ""),
        ({"critic_warmup": 3}, {"warmup_steps": 0}, ""),
        ({"student_warmup": False, "discriminator_warmup": False}, {}, "leave the warmup nothing to do"),
        ({"student_warmup": False, "discriminator_warmup": False}, {"warmup_epochs": 0}, ""),
        ({"freeze_discriminator": True}, {}, ""),
        ({"freeze_discriminator": True}, {"warmup_steps": 0}, "leaves it untrained"),
        ({"freeze_discriminator": True}, {"warmup_steps": 0, "gad_steps": 0}, ""),
        ({"freeze_discriminator": True, "discriminator_warmup": False}, {}, "leaves it untrained"),
    ],
)
def test_a_warmup_must_train_what_it_is_for(algorithm: dict, schedule: dict, wrong: str) -> None:
    config = Config(algorithm=AlgorithmSettings(**algorithm), schedule=ScheduleSettings(**schedule))
    if not wrong:
        assert stage_steps(config, ["warmup", "gad"], steps_per_epoch=7)
        return
    with pytest.raises(UserError, match=wrong):
        stage_steps(config, ["warmup", "gad"], steps_per_epoch=7)


def test_the_gate_needs_a_warmup_before_it() -> None:
    config = Config(gate=GateSettings(enabled=True), schedule=ScheduleSettings(warmup_steps=0))
    with pytest.raises(UserError, match="there is none: raise schedule.warmup_epochs"):
        stage_steps(config, ["warmup", "gad"], steps_per_epoch=7)
    assert stage_steps(config, ["seqkd"], steps_per_epoch=7) == {"seqkd": 21}


def test_progress_is_read_from_json_and_from_before_the_gate_existed() -> None:
    progress = Progress(step=9, gate=Gate(((3, 0.5), (5, 0.6)), 2), convergence=Convergence(((9, 0.7, 0.6, 0.8),)))
    state = json.loads(json.dumps(asdict(progress)))
    assert Progress.of(state) == progress
    for name in ("gate", "convergence", "lasted"):
        del state[name]
    assert Progress.of(state) == Progress(started=progress.started, step=9)


def test_a_seed_is_the_same_in_every_process() -> None:
    """A resumed run draws the same samples only while these values stay what they are."""
    assert derived_seed(0, "gad/1", 0) == 214570541580281
    assert derived_seed(7, "evaluation", 12) == 43433807096802


def test_a_seed_depends_on_every_argument() -> None:
    arguments = [(s, p, i) for s in (0, 1, 11) for p in ("gad/1", "gad/11", "warmup/1", "") for i in (0, 1, 10, 110)]
    seeds = [derived_seed(*each) for each in arguments]
    assert len(set(seeds)) == len(arguments)
    assert all(0 <= seed < 2**48 for seed in seeds)
