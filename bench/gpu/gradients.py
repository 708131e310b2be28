"""Stage 1: gradients of a small random student and discriminator on the device, in every mode of activation
checkpointing, against float32 on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
from torch import Tensor

from bench.gpu.models import TINY, groups, save_random
from bench.gpu.place import Place, Row, attempt, gate
from bench.step.problem import discriminator_of
from gadcore.config.settings import AlgorithmSettings, DiscriminatorSettings, StudentSettings
from gadcore.data.groups import Group
from gadcore.models.activations import MODES, Mode
from gadcore.models.discriminator import Discriminator
from gadcore.models.learner import Learner
from gadcore.models.spec import ModelSpec
from gadcore.models.student import Student

Autocast = Literal["none", "bfloat16"]
CPU = torch.device("cpu")
SHAPE = {**TINY, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 704}
# Relative L2 error of all gradients together, and of the parameter with the largest one.
TOLERANCE: dict[Autocast, tuple[float, float]] = {"none": (1e-3, 1e-2), "bfloat16": (0.05, 0.3)}
REWARDS = (0.3, -1.0, 0.7, 0.1)
# Below this share of the whole gradient a parameter's error says nothing.
_SMALL = 1e-4


def rows(place: Place) -> Iterator[Row]:
    with TemporaryDirectory() as folder:
        student = save_random(TINY if place.tiny else SHAPE, Path(folder) / "student", CPU, torch.float32)
        path = {"student": student, "discriminator": str(discriminator_of(student, Path(folder) / "discriminator"))}
        made = groups(ModelSpec.resolve(student).template, 2, 9, 12, len(REWARDS))
        for role in path:
            expected = gradients(role, path[role], made, CPU, "off", "none")
            for autocast in TOLERANCE:
                for mode in MODES:
                    case = f"{role}, {mode}" + (", autocast bfloat16" if autocast != "none" else ", float32")
                    yield attempt(
                        case, partial(_compare, role, path[role], made, place, mode, autocast, expected), place
                    )


def _compare(
    role: str,
    path: str,
    made: Sequence[Group],
    place: Place,
    mode: Mode,
    autocast: Autocast,
    expected: dict[str, Tensor],
) -> Row:
    found = gradients(role, path, made, place.device, mode, autocast)
    total = torch.stack([value.norm() for value in expected.values()]).norm().item()
    difference = torch.stack([(found[name] - value).norm() for name, value in expected.items()]).norm().item()
    worst, worst_error = "", 0.0
    for name, value in expected.items():
        size = value.norm().item()
        if size > _SMALL * total and not (error := (found[name] - value).norm().item() / size) <= worst_error:
            worst, worst_error = name, error
    whole, single = TOLERANCE[autocast]
    passed = difference / total <= whole and worst_error <= single
    return {"error": difference / total, "worst": worst, "worst_error": worst_error, "gate": gate(passed)}


def gradients(
    role: str, path: str, made: Sequence[Group], device: torch.device, mode: Mode, autocast: Autocast
) -> dict[str, Tensor]:
    """float64 on the CPU, by parameter: of the GRPO loss for a student, of the BT loss for a discriminator."""
    learner: Learner
    if role == "student":
        settings = StudentSettings(autocast=autocast)
        algorithm = AlgorithmSettings(kl_coef=0.0)
        learner = Student.load(path, settings, algorithm, device=device, activation_checkpointing=mode)
        learner.grpo_backward(made, [REWARDS] * len(made))
    else:
        learner = Discriminator.load(
            path, DiscriminatorSettings(autocast=autocast), device=device, activation_checkpointing=mode
        )
        learner.score(made, backward=True)
    named = learner.model.named_parameters()
    return {name: p.grad.detach().cpu().double() for name, p in named if p.grad is not None}
