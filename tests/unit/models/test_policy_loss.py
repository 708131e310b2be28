"""A policy loss of one's own: one file, named by a setting."""

from __future__ import annotations

import pytest
import torch

from gadcore.config.settings import AlgorithmSettings, StudentSettings
from gadcore.errors import UserError
from gadcore.models.student import Student
from tests.support.builders import assert_same_gradients, exact_norms, gradients, groups
from tests.support.tiny import tiny_model

OWN = """
import torch

def reinforce(inputs):
    return -(inputs.token_advantages * inputs.logprob).sum() / inputs.denominator

def clipped(inputs):
    a, s = inputs.token_advantages, inputs.algorithm
    ratio = (inputs.logprob - inputs.logprob.detach()).exp()
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - s.clip_low, 1 + s.clip_high) * a) * inputs.importance_weights
    delta = inputs.ref_logprob - inputs.logprob
    return (loss + s.kl_coef * (delta.exp() - delta - 1)).sum() / inputs.denominator

def wrong(inputs):
    return 3.0
"""
REWARDS = [[1.0, 2.0, 4.0], [0.0, 5.0, 1.0], [3.0, 1.0, 1.0]]


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def pupil(loss: str | None, budget: int = 10**6, cap: float | None = None) -> Student:
    made = Student(
        exact_norms(tiny_model().double()),
        StudentSettings(),
        AlgorithmSettings(loss=loss, kl_coef=0.05, importance_cap=cap),
        temperature=0.8,
        micro_batch_tokens=budget,
        activation_checkpointing="off",
    )
    made.freeze_reference()
    with torch.no_grad():
        # Else the KL and its gradient are 0.
        for p in made.reference.parameters():
            p.mul_(1.01)
    return made


@pytest.mark.parametrize("cap", [None, 1.2, 1e9])
@pytest.mark.parametrize("budget", [10**6, 40])
def test_the_built_in_loss_written_by_hand_has_its_gradients(own, budget, cap) -> None:
    fused, by_hand = pupil(None, budget, cap), pupil("own_losses:clipped", budget, cap)
    stats, other = fused.grpo_backward(groups(3, 3), REWARDS), by_hand.grpo_backward(groups(3, 3), REWARDS)
    assert_same_gradients(gradients(by_hand.model), gradients(fused.model), rtol=1e-9, atol=1e-12)
    assert other.loss == pytest.approx(stats.loss, rel=1e-9) and other.kl == pytest.approx(stats.kl, rel=1e-9) != 0


def test_another_loss_has_other_gradients_that_no_cut_changes(own) -> None:
    whole, cut, fused = pupil("own_losses:reinforce"), pupil("own_losses:reinforce", 40), pupil(None)
    for each in (whole, cut, fused):
        each.grpo_backward(groups(3, 3), REWARDS)
    assert_same_gradients(gradients(cut.model), gradients(whole.model), rtol=1e-9, atol=1e-12)
    # At ratio 1 the clipped loss is REINFORCE with a KL term.
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.allclose(gradients(whole.model)[name], gradients(fused.model)[name])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("own_losses:nothing", "has no function 'nothing'"),
        ("no_such_module:f", "the module no_such_module cannot be imported"),
    ],
)
def test_a_function_that_is_not_there(own, name, says) -> None:
    with pytest.raises(UserError, match=f"algorithm.loss = '{name}': .*{says}"):
        pupil(name)


def test_a_function_that_returns_no_loss(own) -> None:
    with pytest.raises(UserError, match="must return a scalar tensor with a gradient to inputs.logprob: got 3.0"):
        pupil("own_losses:wrong").grpo_backward(groups(3, 3), REWARDS)
