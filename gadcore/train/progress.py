"""How long the stages of a run last, and where it stands."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gadcore.config.settings import Config
from gadcore.errors import UserError
from gadcore.train.convergence import Convergence
from gadcore.train.curriculum import Curriculum
from gadcore.train.gate import Gate

TIME_FORMAT = "%Y-%m-%d %H:%M"
# Commands whose last stage has their name, and that train the student alone.
BASELINES = ("seqkd", "soda")


@dataclass
class Progress:
    """Where the run stands; all of it is in every checkpoint.

    started: local time of the run's start.
    step: global, over stages. stage, stage_step: the last finished step. done: finished stages.
    lasted: steps of each of them.
    evaluations: held-out results by name. seconds: per phase. tokens: sampled and trained.
    gate, convergence, curriculum: what they measured and decided.
    """

    started: str = field(default_factory=lambda: time.strftime(TIME_FORMAT))
    step: int = 0
    stage: str = ""
    stage_step: int = 0
    done: list[str] = field(default_factory=list)
    lasted: dict[str, int] = field(default_factory=dict)
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=lambda: {"sampled": 0, "trained": 0})
    gate: Gate = field(default_factory=Gate)
    convergence: Convergence = field(default_factory=Convergence)
    curriculum: Curriculum = field(default_factory=Curriculum)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Progress:
        """From asdict() through JSON."""
        gate, convergence = Gate.of(state.get("gate", {})), Convergence.of(state.get("convergence", {}))
        curriculum = Curriculum.of(state.get("curriculum", {}))
        return cls(**{**state, "gate": gate, "convergence": convergence, "curriculum": curriculum})


def stages_of(config: Config, command: str) -> tuple[str, ...]:
    """The stages of a run by the command `train`, `seqkd` or `soda`, in order."""
    if command == "seqkd":
        return ("seqkd",)
    stages = ("soda",) if command == "soda" else ("warmup", "gad")
    return ("sft", *stages) if config.schedule.has_sft else stages


def command_of(stages: Collection[str]) -> str:
    """The command whose run has these stages."""
    return next((command for command in BASELINES if command in stages), "train")


def has_discriminator(stages: Collection[str]) -> bool:
    """Whether a run of these stages trains a discriminator: all but the baselines do."""
    return command_of(stages) not in BASELINES


def stage_steps(config: Config, stages: Sequence[str], steps_per_epoch: int) -> dict[str, int]:
    """Steps of each stage, in order, under its epochs and its upper limit.

    Raises UserError where settings of the algorithm and these lengths leave a model untrained, or nothing to do.
    """
    schedule = config.schedule
    result = {}
    for stage in stages:
        steps, limit = getattr(schedule, f"{stage}_epochs") * steps_per_epoch, getattr(schedule, f"{stage}_steps")
        result[stage] = steps if limit is None else min(steps, limit)
    if "warmup" in result:
        _check_warmup(config, result["warmup"], gad=result.get("gad", 0))
    return result


def other_stages(folder: Path, theirs: Sequence[str], stages: Sequence[str]) -> str:
    """What a user is told who resumes a run by another command."""
    found = " and ".join(theirs) or "other stages"
    return (
        f"{folder} is a run of {found}, not of {' and '.join(stages)}: resume it with the command that it was "
        "started with"
    )


def _check_warmup(config: Config, steps: int, *, gad: int) -> None:
    algorithm = config.algorithm
    if steps and not algorithm.student_warmup and not algorithm.discriminator_warmup:
        raise UserError(
            "algorithm.student_warmup = false and algorithm.discriminator_warmup = false leave the warmup nothing to "
            "do: set schedule.warmup_epochs = 0, or one of them back"
        )
    if steps and algorithm.student_warmup and algorithm.critic_warmup >= steps:
        raise UserError(
            f"algorithm.critic_warmup = {algorithm.critic_warmup} covers all {steps} steps of the warmup, so that the "
            "student would never be trained in it: lower it, or say so by algorithm.student_warmup = false"
        )
    if gad and algorithm.freeze_discriminator and not (steps and algorithm.discriminator_warmup):
        raise UserError(
            "algorithm.freeze_discriminator = true without a warmup of the discriminator leaves it untrained: give it "
            "one (schedule.warmup_epochs, algorithm.discriminator_warmup)"
        )
    if gad and config.gate.enabled and not steps:
        raise UserError("gate.enabled makes the warmup longer, and there is none: raise schedule.warmup_epochs")
