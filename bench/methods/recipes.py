"""The methods that are compared, and the settings of each data set. Nothing here was tuned on what is reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

BUNDLED = "smollm2-135m-instruct"
TINY = "tiny"
# No stage ends by its epochs: its steps say how long it is.
EPOCHS = 10**6
# What a method is held against at equal seconds.
MEASURE_OF_TIME = "gad_plateau"


@dataclass(frozen=True)
class Lengths:
    """Steps of the three parts of GAD after the plateau warmup; every method makes as many steps in all."""

    cross_entropy: int
    discriminator: int
    gad: int

    @property
    def total(self) -> int:
        return self.cross_entropy + self.discriminator + self.gad


@dataclass(frozen=True)
class Method:
    """command: of gadcore.run; "": train. steps: by stage, in order. stretched: the stage that is made longer or
    shorter so that a run lasts given seconds. settings: beside those of the data set."""

    says: str
    steps: Callable[[Lengths], dict[str, int]]
    stretched: str
    command: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


def _plateau(n: Lengths) -> dict[str, int]:
    return {"sft": n.cross_entropy, "warmup": n.discriminator, "gad": n.gad}


METHODS = {
    # First, since the others need its seconds.
    "gad_plateau": Method(
        "cross-entropy to its plateau, D alone, then GAD", _plateau, "gad", settings={"algorithm.student_warmup": False}
    ),
    "seqkd": Method("cross-entropy on the teacher's text", lambda n: {"seqkd": n.total}, "seqkd", "seqkd"),
    "soda": Method(
        "DPO of the teacher's text against one snapshot of the student's own responses",
        lambda n: {"soda": n.total},
        "soda",
        "soda",
    ),
    "gad": Method(
        "the paper's warmup, cross-entropy and D together, then GAD",
        lambda n: {"warmup": n.cross_entropy + n.discriminator, "gad": n.gad},
        "warmup",
    ),
    "gad_frozen": Method(
        "as gad_plateau, but D learns nothing during GAD",
        _plateau,
        "gad",
        settings={"algorithm.student_warmup": False, "algorithm.freeze_discriminator": True},
    ),
}


@dataclass(frozen=True)
class Recipe:
    """What the methods have in common on a data set. model: of the student; TINY: small random ones.

    samples: responses to a held-out prompt. primary: the measure that verdicts are about, chosen before any run.
    core_minutes: of a row that lasts as long as MEASURE_OF_TIME's, estimated for one core of an AVX2 machine.
    """

    says: str
    model: str
    lengths: Lengths
    settings: Mapping[str, Any]
    samples: int
    primary: str
    core_minutes: float


_SMOLLM2 = {
    "student.dtype": "float32", "student.autocast": "none", "student.lr": 2e-5, "student.warmup_lr": 5e-5,
    "student.seqkd_lr": 5e-5, "student.soda_lr": 5e-6, "discriminator.model": "student",
    "discriminator.dtype": "float32", "discriminator.autocast": "none", "discriminator.lr": 5e-5,
    "rollout.engine": "vllm", "rollout.dtype": "float32", "rollout.group_size": 8, "rollout.temperature": 0.8,
    "schedule.batch_size": 4, "schedule.micro_batch_tokens": 2048,
}  # fmt: skip
_TINY = {
    "student.lr": 3e-4, "student.warmup_lr": 3e-3, "student.seqkd_lr": 3e-3, "student.soda_lr": 3e-4,
    "student.grad_clip": 1.0, "discriminator.lr": 3e-3, "discriminator.grad_clip": 1.0,
    "algorithm.kl_coef": 0.0, "rollout.engine": "hf", "rollout.group_size": 8, "rollout.temperature": 1.0,
    "schedule.batch_size": 16, "schedule.micro_batch_tokens": 100_000,
    "data.max_prompt_tokens": 8, "data.max_response_tokens": 16,
}  # fmt: skip
_TINY_LENGTHS = Lengths(cross_entropy=300, discriminator=100, gad=300)

RECIPES = {
    "house": Recipe(
        "the built-in rows", BUNDLED, Lengths(102, 10, 30),
        {**_SMOLLM2, "data.max_prompt_tokens": 96, "data.max_response_tokens": 64},
        samples=8, primary="style", core_minutes=34,
    ),
    "real": Recipe(
        "real text", BUNDLED, Lengths(206, 20, 30),
        {**_SMOLLM2, "data.max_prompt_tokens": 256, "data.max_response_tokens": 128},
        samples=4, primary="style", core_minutes=90,
    ),
    "manners": Recipe("designed: manners", TINY, _TINY_LENGTHS, _TINY, samples=8, primary="right", core_minutes=4),
    "copies": Recipe("designed: copies", TINY, _TINY_LENGTHS, _TINY, samples=8, primary="right", core_minutes=4),
}  # fmt: skip

QUICK = Recipe("quick", TINY, Lengths(2, 1, 2), {**_TINY, "schedule.batch_size": 4}, 2, "style", 0)


def training_settings(method: str, recipe: Recipe, steps: Mapping[str, int]) -> dict[str, Any]:
    """Settings of gadcore.run by their dotted names, without those that name files, device and seed."""
    schedule: dict[str, Any] = {}
    for stage, count in steps.items():
        schedule |= {f"schedule.{stage}_epochs": EPOCHS, f"schedule.{stage}_steps": count}
    return {**recipe.settings, **METHODS[method].settings, **schedule}
