"""linear_grpo_loss with importance weights, in every implementation, against the formulas in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gadcore.kernels.layout import GroupLayout
from gadcore.kernels.linear_grpo_loss import linear_grpo_loss
from tests.support.kernel_grid import F64, FORWARD, GRADIENT, leaves64, logprob64, relative_error

LOSS = dict(clip_low=0.2, clip_high=0.28, kl_coef=0.3)
TEMPERATURE, CAP = 0.8, 1.5
IMPLS = [("reference", F64), ("reference", torch.float32), ("cpu", torch.float32), ("cpu", torch.bfloat16)]


class Case:
    """T tokens of two samples, one of five of them ignored where there are as many."""

    def __init__(self, T: int, H: int, V: int, dtype: torch.dtype, *, old: bool, bias: bool) -> None:
        generator = torch.Generator().manual_seed(T + V)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=F64)

        self.hidden, self.weight = normal(T, H).to(dtype), normal(V, H).to(dtype)
        self.bias = normal(V).to(dtype) if bias else None
        self.targets = torch.randint(V, (T,), generator=generator)
        self.targets[4::5] = -100
        self.kept = self.targets != -100
        results = torch.promote_types(dtype, torch.float32)
        self.layout = GroupLayout.of([2], teacher=False, lengths=[T // 2, T - T // 2])
        self.advantages = torch.tensor([1.3, -0.7])
        self.leaves = leaves64(self.hidden, self.weight, self.bias)
        logprob, _ = logprob64(*self.leaves, self.targets, TEMPERATURE)
        near = [(logprob.detach() + 0.4 * normal(T)).to(results) for _ in range(3)]
        self.old, self.ref, self.sampler = near[0] if old else None, near[1], near[2]
        per_token = self.advantages.to(F64)[self.layout.sequence_of]
        before = logprob.detach() if self.old is None else self.old.to(F64)
        self.importance = (before - self.sampler.to(F64)).exp().clamp(max=CAP)
        ratio = (logprob - before).exp()
        policy = -torch.minimum(ratio * per_token, ratio.clamp(0.8, 1.28) * per_token)
        gap = self.ref.to(F64) - logprob
        terms = self.importance * policy + LOSS["kl_coef"] * (gap.exp() - gap - 1)
        self.loss = terms[self.kept].sum() / (T + 2)

    def run(self, impl: Any, part: slice = slice(None), **changed: Any) -> Any:
        """The loss of a part of the tokens, with the batch's denominator; gradients of hidden, weight and bias."""
        leaves = [None if t is None else t.detach().requires_grad_() for t in (self.hidden, self.weight, self.bias)]
        settings: dict[str, Any] = dict(
            advantages=self.advantages,
            ref_logprob=self.ref[part],
            old_logprob=None if self.old is None else self.old[part],
            sampler_logprob=self.sampler[part],
            importance_cap=CAP,
        )
        places = range(*part.indices(len(self.targets)))
        first = len(self.targets) // 2
        lengths = [sum(i < first for i in places), sum(i >= first for i in places)]
        result = linear_grpo_loss(
            leaves[0][part],
            leaves[1],
            self.targets[part],
            GroupLayout.of([2], teacher=False, lengths=lengths),
            bias=leaves[2],
            temperature=TEMPERATURE,
            denominator=len(self.targets) + 2,
            impl=impl,
            **(LOSS | settings | changed),
        )
        result.loss.backward()
        return result, [leaf.grad for leaf in leaves if leaf is not None]


@pytest.mark.parametrize(("impl", "dtype"), IMPLS, ids=str)
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("T, H, V, bias", [(1, 8, 5, False), (9, 24, 100, True), (300, 16, 333, False)])
def test_loss_and_gradients_are_those_of_the_formulas(impl, dtype, old: bool, T: int, H: int, V: int, bias) -> None:
    case = Case(T, H, V, dtype, old=old, bias=bias)
    assert T == 1 or 0 < (case.importance == CAP).sum() < T
    result, gradients = case.run(impl)
    assert relative_error(result.loss, case.loss.detach(), 1.0) <= FORWARD[dtype]
    expected = torch.autograd.grad(case.loss, [leaf for leaf in case.leaves if leaf is not None])
    for actual, truth in zip(gradients, expected, strict=True):
        assert relative_error(actual, truth, 0.0) <= GRADIENT[dtype]


@pytest.mark.parametrize(("impl", "dtype"), IMPLS[:3], ids=str)
def test_parts_of_a_batch_add_up(impl, dtype) -> None:
    case = Case(30, 16, 50, dtype, old=False, bias=True)
    whole, expected = case.run(impl)
    parts = [case.run(impl, part) for part in (slice(0, 1), slice(1, 17), slice(17, 30))]
    assert sum(result.loss.item() for result, _ in parts) == pytest.approx(whole.loss.item(), rel=1e-5)
    for i, gradient in enumerate(expected):
        tolerance = dict(rtol=1e-9, atol=1e-12) if dtype == F64 else dict(rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(sum(gradients[i] for _, gradients in parts), gradient, **tolerance)


@pytest.mark.parametrize(("impl", "dtype"), IMPLS, ids=str)
def test_a_sampler_that_computes_as_the_trainer_does_changes_no_bit(impl, dtype) -> None:
    case = Case(30, 16, 50, dtype, old=False, bias=True)
    plain, expected = case.run(impl, sampler_logprob=None, importance_cap=None)
    weighed, gradients = case.run(impl, sampler_logprob=plain.metrics.logprob)
    assert torch.equal(weighed.loss, plain.loss) and all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize(("impl", "dtype"), IMPLS, ids=str)
def test_a_log_prob_of_nan_shows_and_one_of_an_ignored_token_does_not(impl, dtype) -> None:
    case = Case(9, 8, 20, dtype, old=False, bias=False)
    expected, gradients = case.run(impl)
    case.sampler[4] = torch.nan
    again, same = case.run(impl)
    assert torch.equal(again.loss, expected.loss) and all(map(torch.equal, same, gradients))
    case.sampler[3] = torch.nan
    assert case.run(impl)[0].loss.isnan()


def test_a_gradient_that_is_added_in_place_is_weighed_too() -> None:
    case = Case(30, 16, 50, torch.float32, old=False, bias=False)
    _, (hidden, weight) = case.run("cpu")
    added = torch.ones_like(weight)
    _, (again, none) = case.run("cpu", add_weight_gradient_to=added)
    assert none is None and torch.equal(again, hidden)
    torch.testing.assert_close(added, weight + 1)
