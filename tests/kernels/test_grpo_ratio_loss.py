"""Advantages and the GRPO ratio loss against the formulas written out in plain Python."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from gadcore.kernels.grpo_ratio_loss import GRPOLoss, group_advantages, grpo_ratio_loss
from gadcore.kernels.layout import GroupLayout

F64 = torch.float64
LOW, HIGH = 0.1, 0.3


def layout(*samples: int) -> GroupLayout:
    return GroupLayout.of(samples, teacher=False)


def ratio_loss(logprob: Tensor, advantages: Tensor, **changed: Any) -> GRPOLoss:
    settings = dict(
        ref_logprob=None, old_logprob=None, clip_low=LOW, clip_high=HIGH, kl_coef=0.0, denominator=len(logprob)
    )
    return grpo_ratio_loss(logprob, advantages, **(settings | changed))  # type: ignore[arg-type]


def tokens(count: int = 9, spread: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprob, old, ref, advantages; fp64, no ratio near a kink of the loss."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(4, count, generator=generator, dtype=F64)
    logprob, old, ref, advantages = values * torch.tensor([[spread], [spread], [spread], [1.0]], dtype=F64)
    ratio = (logprob - old).exp()
    assert min((ratio - 1 + LOW).abs().min(), (ratio - 1 - HIGH).abs().min(), advantages.abs().min()) > 1e-3
    return logprob, old, ref, advantages


def literal(logprob: Tensor, old: Tensor, ref: Tensor | None, advantages: Tensor, beta: float) -> list[float]:
    """Loss of every token."""
    losses = []
    for t, a in enumerate(advantages.tolist()):
        rho = math.exp(logprob[t] - old[t])
        loss = -min(rho * a, min(max(rho, 1 - LOW), 1 + HIGH) * a)
        if ref is not None:
            difference = float(ref[t] - logprob[t])
            loss += beta * (math.exp(difference) - difference - 1)
        losses.append(loss)
    return losses


@pytest.mark.parametrize("normalise", [True, False])
def test_advantages_of_ragged_groups(normalise: bool) -> None:
    sizes, generator = (3, 1, 2, 5), torch.Generator().manual_seed(0)
    rewards = torch.randn(sum(sizes), generator=generator, dtype=F64) * 4
    actual = group_advantages(rewards, layout(*sizes), normalise=normalise)
    expected = []
    for group in rewards.split(sizes):
        values = group.tolist()
        scale = statistics.stdev(values) + 1e-6 if normalise and len(values) > 1 else 1.0
        expected += [(v - statistics.fmean(values)) / scale for v in values]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=F64), rtol=1e-12, atol=1e-14)
    assert actual[3] == 0


def test_advantages_by_hand() -> None:
    actual = group_advantages(torch.tensor([1.0, 3.0, 0.5, 0.5], dtype=F64), layout(2, 2))
    expected = 1 / (math.sqrt(2) + 1e-6)
    assert actual.tolist() == pytest.approx([-expected, expected, 0, 0])


def test_equal_rewards_give_no_advantage_in_spite_of_rounding() -> None:
    rewards = torch.full((7,), 0.1, dtype=F64)
    assert group_advantages(rewards, layout(7)).abs().max() < 1e-9


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("count", [1, 9])
def test_loss_and_figures_against_the_formulas(count: int, beta: float) -> None:
    logprob, old, ref, advantages = tokens(count)
    denominator = count + 4
    result = ratio_loss(logprob, advantages, old_logprob=old, ref_logprob=ref, kl_coef=beta, denominator=denominator)
    expected = literal(logprob, old, ref, advantages, beta)
    assert result.loss.item() == pytest.approx(sum(expected) / denominator, rel=1e-12)
    k3 = [math.exp(r - p) - (r - p) - 1 for r, p in zip(ref.tolist(), logprob.tolist(), strict=True)]
    assert result.metrics.kl_sum.item() == pytest.approx(sum(k3), rel=1e-12)
    ratios = (logprob - old).exp()
    assert result.metrics.ratio_max == ratios.max()
    lost = ((ratios > 1 + HIGH) & (advantages > 0)) | ((ratios < 1 - LOW) & (advantages < 0))
    assert result.metrics.clipped_sum == lost.sum()
    if count == 9:
        assert 0 < lost.sum() < count


@pytest.mark.parametrize(
    ("rho", "advantage", "value", "slope"),
    [
        (1.5, 2.0, -2.6, 0.0),  # clipped above
        (1.5, -2.0, 3.0, 3.0),  # a bad token grew likelier: never clipped
        (0.5, -2.0, 1.8, 0.0),  # clipped below
        (0.5, 2.0, -1.0, -1.0),
        (1.2, 2.0, -2.4, -2.4),  # inside the asymmetric range
        (0.95, -2.0, 1.9, 1.9),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_one_token_by_hand(rho: float, advantage: float, value: float, slope: float) -> None:
    logprob = torch.tensor([math.log(rho)], dtype=F64, requires_grad=True)
    result = ratio_loss(logprob, torch.tensor([advantage], dtype=F64), old_logprob=torch.zeros(1, dtype=F64))
    result.loss.backward()
    assert result.loss.item() == pytest.approx(value)
    assert logprob.grad is not None and logprob.grad.item() == pytest.approx(slope)
    assert int(result.metrics.clipped_sum) == (slope == 0 and advantage != 0)


def test_gradcheck() -> None:
    logprob, old, ref, advantages = tokens()

    def loss(x: Tensor) -> Tensor:
        return ratio_loss(x, advantages, old_logprob=old, ref_logprob=ref, kl_coef=0.3).loss

    assert torch.autograd.gradcheck(loss, logprob.requires_grad_())


def test_without_old_logprobs_the_gradient_is_the_policy_gradient() -> None:
    """rho is 1, its gradient that of logprob; k3 has the gradient 1 - exp(ref - logprob)."""
    logprob, _, ref, advantages = tokens()
    leaf = logprob.requires_grad_()
    result = ratio_loss(leaf, advantages, ref_logprob=ref, kl_coef=0.3, denominator=5)
    result.loss.backward()
    expected = (-advantages + 0.3 * (1 - (ref - logprob.detach()).exp())) / 5
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-12, atol=1e-14)
    assert result.metrics.ratio_max == 1 and result.metrics.clipped_sum == 0


def test_losses_and_gradients_of_micro_batches_add_up() -> None:
    logprob, old, ref, advantages = tokens()
    whole, parts = (logprob.clone().requires_grad_() for _ in range(2))
    result = ratio_loss(whole, advantages, old_logprob=old, ref_logprob=ref, kl_coef=0.3)
    result.loss.backward()
    losses = kl = clipped = 0.0
    for cut in (slice(0, 1), slice(1, 6), slice(6, 9)):
        part = ratio_loss(
            parts[cut], advantages[cut], old_logprob=old[cut], ref_logprob=ref[cut], kl_coef=0.3, denominator=9
        )
        part.loss.backward()
        losses, kl, clipped = (
            losses + part.loss.item(),
            kl + part.metrics.kl_sum.item(),
            clipped + part.metrics.clipped_sum.item(),
        )
    assert losses == pytest.approx(result.loss.item(), rel=1e-12)
    assert (kl, clipped) == pytest.approx((result.metrics.kl_sum.item(), result.metrics.clipped_sum.item()))
    torch.testing.assert_close(parts.grad, whole.grad)


def test_only_the_loss_has_a_gradient_and_no_gradient_reaches_the_others() -> None:
    logprob, old, ref, advantages = (each.float().requires_grad_() for each in tokens())
    result = ratio_loss(logprob, advantages.detach(), old_logprob=old.detach(), ref_logprob=ref.detach(), kl_coef=0.3)
    assert result.loss.requires_grad and result.loss.dtype == torch.float32
    assert not any(each.requires_grad for each in result.metrics)


def test_a_reference_without_kl_is_measured_and_does_not_count() -> None:
    logprob, old, ref, advantages = tokens()
    measured = ratio_loss(logprob, advantages, old_logprob=old, ref_logprob=ref)
    plain = ratio_loss(logprob, advantages, old_logprob=old)
    assert measured.loss == plain.loss and measured.metrics.kl_sum > 0 and plain.metrics.kl_sum == 0
    assert ratio_loss(logprob, advantages, ref_logprob=logprob).metrics.kl_sum == 0


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("with_old", [True, False])
@pytest.mark.parametrize("cap", [1.0, 1.5])
def test_importance_weights_are_factors_of_the_policy_term_alone(impl, with_old: bool, cap: float) -> None:
    logprob, old, ref, advantages = (t if impl == "reference" else t.float() for t in tokens())
    sampler = logprob + torch.tensor([0.4, -0.4, 0.0, 0.1, -0.1, 1.0, -1.0, 0.3, -0.3], dtype=logprob.dtype)
    leaf = logprob.requires_grad_()
    settings: dict[str, Any] = dict(ref_logprob=ref, old_logprob=old if with_old else None, kl_coef=0.3, impl=impl)
    result = ratio_loss(leaf, advantages, sampler_logprob=sampler, importance_cap=cap, **settings)
    (gradient,) = torch.autograd.grad(result.loss, leaf)
    before = old if with_old else logprob.detach()
    weights = [min(math.exp(b - s), cap) for b, s in zip(before.tolist(), sampler.tolist(), strict=True)]
    policy, whole = (literal(leaf.detach(), before, r, advantages, b) for r, b in ((None, 0.0), (ref, 0.3)))
    terms = [w * p + (both - p) for w, p, both in zip(weights, policy, whole, strict=True)]
    assert result.loss.item() == pytest.approx(sum(terms) / 9, rel=1e-12 if impl == "reference" else 1e-5)
    assert 0 < sum(w == cap for w in weights) < 9

    def slope(**changed: Any) -> Tensor:
        return torch.autograd.grad(ratio_loss(leaf, advantages, **(settings | changed)).loss, leaf)[0]

    of_policy = slope(ref_logprob=None, kl_coef=0.0)
    expected = torch.tensor(weights, dtype=leaf.dtype) * of_policy + (slope() - of_policy)
    torch.testing.assert_close(gradient, expected, rtol=1e-10 if impl == "reference" else 1e-4, atol=1e-7)
    plain = ratio_loss(leaf, advantages, **settings).metrics
    assert result.metrics.kl_sum == plain.kl_sum and result.metrics.ratio_max == plain.ratio_max


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"importance_cap": 2.0}, "give both sampler_logprob and importance_cap, or neither"),
        ({"sampler_logprob": torch.zeros(9, dtype=F64)}, "give both"),
        (
            {"sampler_logprob": torch.zeros(8, dtype=F64), "importance_cap": 2.0},
            r"sampler_logprob must be torch.float64",
        ),
        ({"sampler_logprob": torch.zeros(9), "importance_cap": 2.0}, r"got torch.float32 \[9\]"),
        ({"sampler_logprob": torch.zeros(9, dtype=F64), "importance_cap": 0.0}, "importance_cap must be above 0"),
    ],
)
def test_importance_weights_that_cannot_be_made_are_errors(given: dict[str, Any], sentence: str) -> None:
    logprob, _, _, advantages = tokens()
    with pytest.raises(ValueError, match=sentence):
        ratio_loss(logprob, advantages, **given)


def test_kl_without_a_reference_is_an_error() -> None:
    logprob, _, _, advantages = tokens()
    with pytest.raises(ValueError, match="kl_coef = 0.001 needs ref_logprob"):
        ratio_loss(logprob, advantages, kl_coef=0.001)
