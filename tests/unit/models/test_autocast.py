"""student.autocast = discriminator.autocast = "bfloat16" with float32 weights, as every preset of the paper has it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gadcore.config.settings import DiscriminatorSettings, StudentSettings
from gadcore.models.activations import MODES, bytes_per_token, choose_mode, set_mode
from gadcore.models.backbone import is_pruned
from gadcore.models.precision import autocast
from tests.support.builders import discriminator, gradients, groups, student
from tests.support.tiny import FAMILIES, tiny_model

REWARDS = [[1.0, 2.0, 4.0], [0.5, 0.0, 1.0]]


def error(actual: dict, expected: dict) -> float:
    """Of all gradients together, relative."""
    assert actual.keys() == expected.keys()
    difference = sum((actual[n] - expected[n]).square().sum() for n in expected)
    return float((difference / sum(g.square().sum() for g in expected.values())).sqrt())


def student_gradients(kind: str, precision: str, mode: str) -> dict[str, torch.Tensor]:
    policy = student(torch.float32, kind=kind, kl_coef=0.05)
    policy.settings = StudentSettings(autocast=precision)
    assert is_pruned(policy.model)
    set_mode(policy.model, mode, 0)
    policy.freeze_reference()
    policy.grpo_backward(groups(2, 3), REWARDS)
    return gradients(policy.model)


def discriminator_gradients(folder, kind: str, precision: str, mode: str) -> dict[str, torch.Tensor]:
    judge = discriminator(folder, torch.float32, kind=kind)
    judge.settings = DiscriminatorSettings(autocast=precision)
    set_mode(judge.model, mode, 0)
    judge.score(groups(2, 3), backward=True)
    return gradients(judge.model)


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradients_of_the_student_in_every_mode(kind) -> None:
    exact = student_gradients(kind, "none", "off")
    off = student_gradients(kind, "bfloat16", "off")
    assert {g.dtype for g in off.values()} == {torch.float32}
    assert 1e-6 < error(off, exact) < 0.1
    for mode in MODES[1:]:
        again = student_gradients(kind, "bfloat16", mode)
        assert all(torch.equal(again[name], off[name]) for name in off)


@pytest.mark.parametrize("kind", FAMILIES)
def test_gradients_of_the_discriminator_in_every_mode(tmp_path, kind) -> None:
    exact = discriminator_gradients(tmp_path, kind, "none", "off")
    off = discriminator_gradients(tmp_path, kind, "bfloat16", "off")
    assert 1e-6 < error(off, exact) < 0.1
    for mode in MODES[1:]:
        again = discriminator_gradients(tmp_path, kind, "bfloat16", mode)
        assert all(torch.equal(again[name], off[name]) for name in off)


class Casts(TorchDispatchMode):
    """The casts of one shape that are alive."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.made = shape, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.shape == self.shape and out.dtype == torch.bfloat16:
            self.made.append(torch.multiprocessing.reductions.StorageWeakRef(out.untyped_storage()))
        return out


def test_no_second_copy_of_the_weights_is_kept() -> None:
    layers = torch.nn.Sequential(*(torch.nn.Linear(24, 24, bias=False) for _ in range(4))).requires_grad_(False)
    with Casts((24, 24)) as casts, autocast("bfloat16", torch.device("cpu")):
        layers(torch.ones(2, 24))
        alive = sum(not cast.expired() for cast in casts.made)
    assert len(casts.made) == 4 and alive == 0


def test_autocast_keeps_less_and_decides_by_that() -> None:
    model = tiny_model()
    wide, narrow = bytes_per_token(copy.deepcopy(model)), bytes_per_token(model, "bfloat16")
    assert narrow["full"] == wide["full"] and narrow["selective"] < 0.7 * wide["selective"]
    tokens = 1000
    between = int((narrow["selective"] + wide["selective"]) / 2 * tokens / 0.4)
    assert choose_mode(model, tokens, "bfloat16", between) != "full" == choose_mode(model, tokens, "none", between)
