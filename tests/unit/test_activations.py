"""Activation checkpointing: the same gradients in every mode, less memory, and the least recomputation that fits."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from builders import discriminator, gradients, groups, student
from gadcore.memory.activations import MODES, bytes_per_token, choose_mode, set_mode


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_every_mode_gives_the_same_gradients(tmp_path, kind, mode) -> None:
    batch, rewards = groups(2, 3), [[1.0, 2.0, 4.0]] * 2
    plain, again = (student(torch.float32, kind=kind, kl_coef=0.05) for _ in range(2))
    set_mode(again.model, mode, 0)
    for policy in (plain, again):
        policy.freeze_reference()
    assert plain.grpo_backward(batch, rewards) == again.grpo_backward(batch, rewards)
    expected, actual = gradients(plain.model), gradients(again.model)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)

    plain, again = (discriminator(tmp_path, torch.float32, kind=kind) for _ in range(2))
    set_mode(again.model, mode, 0)
    assert plain.judge(batch, backward=True) == again.judge(batch, backward=True)
    expected, actual = gradients(plain.model), gradients(again.model)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_the_modes_keep_what_they_say() -> None:
    kept = []
    for mode in MODES:
        policy = student(torch.float32, kl_coef=0.0)
        set_mode(policy.model, mode, 0)
        kept.append(bytes_per_token(policy.model)["off"])
    # Measured with hooks, which do not see what selective checkpointing stores inside.
    assert kept[0] > 4 * kept[2] and kept[1] < kept[0]


def test_measuring_leaves_nothing_behind() -> None:
    model = student(torch.float32).model
    before = _tensors()
    bytes_per_token(model)
    assert _tensors() <= before


def _tensors() -> int:
    """Tensors that are alive in this process."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_planned_bytes_are_in_order_and_decide() -> None:
    model = student(torch.float32).model
    planned = bytes_per_token(model)
    assert planned["off"] > planned["selective"] > planned["full"] > 0
    tokens = 1000
    for mode in MODES:
        assert choose_mode(model, tokens, available=int(planned[mode] * tokens / 0.4) + 1) == mode
    assert choose_mode(model, tokens, available=0) == "full"
    assert choose_mode(model, 8) == "off"


def test_a_copy_recomputes_its_own_layers() -> None:
    policy = student(torch.float32, kl_coef=0.0)
    set_mode(policy.model, "full", 0)
    other = copy.deepcopy(policy.model)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.zero_()
    ids = torch.tensor([[5, 6, 7]])
    assert other(ids).logits.abs().max() > 0 and policy.model(ids).logits.abs().max() == 0
