"""Activation checkpointing: the same gradients in every mode, less memory, and the least recomputation that fits."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

from gadcore.cpu.recompute import Recomputables, recomputable, recomputing
from gadcore.models import activations
from gadcore.models.activations import MODES, bytes_per_token, choose_mode, set_mode
from tests.support.builders import discriminator, gradients, groups, student


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
    assert plain.score(batch, backward=True) == again.score(batch, backward=True)
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


def test_a_mode_takes_the_place_of_another() -> None:
    policy = student(torch.float32, kl_coef=0.0)
    layer = policy.model.model.layers[0]
    # Looking at a partial's __dict__ changes how it nests in others, and vLLM looks at every module's values.
    vars(activations._AGAIN["full"])
    for mode in ("full", "off", "selective", "off"):
        set_mode(policy.model, mode, 0)
        assert layer.forward.args[0] == mode and layer.forward.args[1].__func__ is type(layer).forward


@pytest.mark.native
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_norms_are_not_kept(kind) -> None:
    policy = student(torch.float32, kind=kind, kl_coef=0.0)
    model = policy.model
    with_recipes = bytes_per_token(model)["off"]
    real = Recomputables.of
    try:
        Recomputables.of = lambda *_: None
        without = bytes_per_token(model)["off"]
    finally:
        Recomputables.of = real
    config = model.config
    # The query and key norms of Qwen3 feed no product.
    assert without - with_recipes == 4 * config.num_hidden_layers * 2 * config.hidden_size


@pytest.mark.native
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_recomputing_changes_no_bit(monkeypatch, kind) -> None:
    batch, rewards = groups(2, 3, ragged=True), [[1.0, 2.0], [1.0, 2.0, 4.0]]
    made = []
    real = Recomputables.pack

    def pack(self, tensor):
        packed = real(self, tensor)
        made.append(not isinstance(packed, torch.Tensor))
        return packed

    monkeypatch.setattr(Recomputables, "pack", pack)
    again = student(torch.float32, kind=kind, kl_coef=0.0)
    again.grpo_backward(batch, rewards)
    assert any(made)
    monkeypatch.setattr(Recomputables, "of", lambda *_: None)
    kept = student(torch.float32, kind=kind, kl_coef=0.0)
    kept.grpo_backward(batch, rewards)
    expected, actual = gradients(kept.model), gradients(again.model)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_recipe_is_for_its_result_alone() -> None:
    recipes = Recomputables()
    x = torch.arange(6.0, requires_grad=True)
    with recipes.collected():
        y = recomputable(x * 2, lambda: x.detach() * 2)
        assert recipes.of(y) and recipes.of(y.view(2, 3)) and recipes.of(y.view(3, 2).T)
        # Half of it, another type, its input, a copy.
        assert not any(recipes.of(t) for t in (y[:3], y[3:], y.view(torch.int32), x, y.clone()))
    assert recipes.of(y) is None


def test_a_recipe_restores_views_and_lets_go_of_the_result() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    calls = []

    def forward(x):
        def again():
            calls.append(torch.is_grad_enabled())
            return x.detach().exp()

        return recomputable(x.exp(), again).T @ weight

    out = recomputing(forward, x)
    assert calls == []
    out.square().sum().backward()
    # For the product; exp() kept its result before there was a recipe.
    assert calls == [False]
    found = x.grad.clone(), weight.grad.clone()
    x.grad = weight.grad = None
    forward(x).square().sum().backward()
    assert torch.equal(found[0], x.grad) and torch.equal(found[1], weight.grad)
