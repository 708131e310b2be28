"""G against the literal specification: CE, GRPO, gradients, cuts, temperature."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from gadcore.config.settings import AlgorithmSettings
from gadcore.data.groups import GroupedBatch, GroupTokens
from gadcore.errors import UserError
from gadcore.kernels.grpo_ratio_loss import group_advantages, grpo_ratio_loss
from gadcore.kernels.layout import GroupLayout
from tests.support.builders import assert_same_gradients, gradients, groups, student
from tests.support.naive import grpo_loss, token_logprobs

TOLERANCE = {torch.float64: dict(rtol=1e-8, atol=1e-10), torch.float32: dict(rtol=5e-3, atol=2e-5)}


def perturbed(model):
    """A reference policy that differs from the model."""
    other = copy.deepcopy(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(9)
    for p in other.parameters():
        p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    return other


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kl", [0.0, 0.05])
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("qwen2", True)])
def test_grpo_equals_the_literal_formulas(dtype, kl, kind, tied) -> None:
    batch = groups(3, 3, ragged=True)
    rewards = [[float(i * i - 2 * i + g) for i in range(len(group.samples))] for g, group in enumerate(batch)]
    ours, theirs = (student(dtype, kind=kind, tied=tied, kl_coef=kl) for _ in range(2))
    reference = perturbed(ours.model) if kl else None
    ours.reference = reference

    stats = ours.grpo_backward(batch, rewards)

    def logps(model):
        return [[token_logprobs(model, g.prompt.token_ids, s.token_ids, 0.8) for s in g.samples] for g in batch]

    policy = logps(theirs.model)
    with torch.no_grad():
        refs = logps(reference) if reference is not None else [None] * len(batch)
    loss = grpo_loss(
        [(p, None, r, torch.tensor(w, dtype=dtype)) for p, r, w in zip(policy, refs, rewards, strict=True)],
        clip=0.2,
        beta=kl,
    )
    loss.backward()
    assert stats.loss == pytest.approx(loss.item(), rel=1e-8 if dtype == torch.float64 else 1e-3, abs=1e-6)
    assert_same_gradients(gradients(ours.model), gradients(theirs.model), **TOLERANCE[dtype])
    assert (stats.kl > 0) == (kl > 0)


def mistaken(batch, policy, spread: float):
    """The batch as a sampler drew it whose log-probs are off by about `spread`; those log-probs, [R] a sample."""
    generator = torch.Generator().manual_seed(4)
    noise = [[spread * torch.randn(len(p), generator=generator) for p in group] for group in policy]
    said = [[(p.detach() + n).float() for p, n in zip(*each, strict=True)] for each in zip(policy, noise, strict=True)]
    for group, of_group in zip(batch, said, strict=True):
        group.samples = [replace(s, logprobs=tuple(x.tolist())) for s, x in zip(group.samples, of_group, strict=True)]
    return said


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("cap", "kl"), [(1.0, 0.0), (1.3, 0.05), (2.0, 0.05)])
def test_importance_weights_equal_the_literal_formulas(dtype, cap, kl) -> None:
    batch = groups(3, 3, ragged=True)
    rewards = [[float(i * i - 2 * i + g) for i in range(len(group.samples))] for g, group in enumerate(batch)]
    theirs = student(dtype, kl_coef=kl)
    reference = perturbed(theirs.model) if kl else None

    def logps(model):
        return [[token_logprobs(model, g.prompt.token_ids, s.token_ids, 0.8) for s in g.samples] for g in batch]

    policy = logps(theirs.model)
    said = mistaken(batch, policy, 0.5)
    with torch.no_grad():
        refs = logps(reference) if reference is not None else [None] * len(batch)
    loss = grpo_loss(
        [(p, None, r, torch.tensor(w, dtype=dtype)) for p, r, w in zip(policy, refs, rewards, strict=True)],
        clip=0.2,
        beta=kl,
        samplers=said,
        cap=cap,
    )
    loss.backward()
    expected = gradients(theirs.model)
    off = torch.cat(
        [p.detach() - s for of in zip(policy, said, strict=True) for p, s in zip(*of, strict=True)]
    ).double()
    for budget in (1, 150, 10**6):
        ours = student(dtype, kl_coef=kl, importance_cap=cap, micro_batch_tokens=budget)
        ours.reference = reference
        stats = ours.grpo_backward(batch, rewards)
        assert stats.loss == pytest.approx(loss.item(), rel=1e-8 if dtype == torch.float64 else 1e-3, abs=1e-6)
        assert_same_gradients(gradients(ours.model), expected, **TOLERANCE[dtype])
        # The mismatch as it is, whatever the weights make of it.
        assert stats.logprob_diff_mean == pytest.approx(off.abs().mean().item(), rel=1e-4)
        assert stats.logprob_diff_max == pytest.approx(off.abs().max().item(), rel=1e-4)
        assert stats.sampler_kl == pytest.approx((off.exp() - off - 1).mean().item(), rel=1e-4)
        assert stats.logprob_far_share == pytest.approx((off.abs() > 0.1).double().mean().item())
        assert stats.capped_share == pytest.approx((off.exp() > cap).double().mean().item())
        assert 0 < stats.capped_share < 1


def test_the_mismatch_is_logged_where_nothing_is_done_about_it() -> None:
    batch, ours = groups(2, 3), student(kl_coef=0.0)
    policy = [[token_logprobs(ours.model, g.prompt.token_ids, s.token_ids, 0.8) for s in g.samples] for g in batch]
    said = mistaken(batch, policy, 1e-3)
    off = torch.cat([p.detach() - s for of in zip(policy, said, strict=True) for p, s in zip(*of, strict=True)])
    stats = ours.grpo_backward(batch, [[1.0, 2.0, 4.0]] * 2)
    # So small a difference that exp(d) - 1 - d in float32 would be rounding.
    assert stats.sampler_kl == pytest.approx((off.expm1() - off).mean().item(), rel=1e-6)
    assert stats.logprob_far_share == 0 and not hasattr(stats, "capped_share")


@pytest.mark.parametrize("kl", [0.0, 0.05])
@pytest.mark.parametrize("spread", [0.01, 1.0])
def test_ratio_loss_clipped_and_unclipped(kl, spread) -> None:
    """With old log-probs of their own: small spread stays unclipped, large spread clips on both sides."""
    generator = torch.Generator().manual_seed(1)
    lengths, samples = [4, 1, 7, 3, 5, 2], 3
    tokens = sum(lengths)
    logprob, old, ref = (torch.randn(tokens, generator=generator, dtype=torch.float64) * spread for _ in range(3))
    rewards = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    layout = GroupLayout.of([samples, samples], teacher=False)

    ours = logprob.clone().requires_grad_()
    advantages = group_advantages(rewards, layout).repeat_interleave(torch.tensor(lengths))
    result = grpo_ratio_loss(
        ours,
        advantages,
        ref_logprob=ref if kl else None,
        old_logprob=old,
        clip_low=0.2,
        clip_high=0.2,
        kl_coef=kl,
        denominator=tokens,
    )
    result.loss.backward()

    theirs = logprob.clone().requires_grad_()

    def per_group(values):
        parts = list(values.split(lengths))
        return [parts[:samples], parts[samples:]]

    loss = grpo_loss(
        list(
            zip(
                per_group(theirs),
                per_group(old),
                per_group(ref) if kl else [None, None],
                rewards.split(samples),
                strict=True,
            )
        ),
        clip=0.2,
        beta=kl,
    )
    loss.backward()
    torch.testing.assert_close(result.loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-14)
    ratio = (logprob - old).exp()
    outside = int(((ratio > 1.2) & (advantages > 0) | (ratio < 0.8) & (advantages < 0)).sum())
    assert int(result.metrics.clipped_sum) == outside and (outside > 0) == (spread == 1.0)


@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_log_probs_of_the_reference_can_be_made_before_it_leaves(budget) -> None:
    batch, rewards = groups(3, 3, ragged=True), [[0.3 * i**2 for i in range(3)]] * 3
    together, apart = (student(micro_batch_tokens=budget) for _ in range(2))
    for each in (together, apart):
        assert each.reference_logprobs(batch) is None
        each.reference = perturbed(each.model)
    made = apart.reference_logprobs(batch)
    assert made is not None and not made.requires_grad
    assert len(made) == sum(len(sample.token_ids) for group in batch for sample in group.samples)
    apart.reference = None
    assert apart.grpo_backward(batch, rewards, made) == together.grpo_backward(batch, rewards)
    mine, theirs = gradients(apart.model), gradients(together.model)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    with pytest.raises(ValueError, match="sampled tokens, ref_logprob"):
        apart.grpo_backward(batch, rewards, made[1:])


def test_ratio_is_one_when_a_batch_gets_one_step() -> None:
    ours = student(kl_coef=0.0)
    stats = ours.grpo_backward(groups(2, 3), [[1.0, 2.0, 4.0]] * 2)
    assert stats.ratio_max == 1.0 and stats.clip_fraction == 0.0


def test_equal_rewards_give_no_gradient() -> None:
    ours = student(kl_coef=0.0)
    ours.grpo_backward(groups(2, 3), [[1.5] * 3] * 2)
    assert all(g.abs().max() == 0 for g in gradients(ours.model).values())


def test_micro_batch_cuts_change_nothing() -> None:
    batch = groups(5, 3, ragged=True)
    rewards = [[0.3 * i**2 - g for i in range(len(group.samples))] for g, group in enumerate(batch)]
    results = []
    for budget in (1, 150, 10**6):
        ours = student(micro_batch_tokens=budget)
        ours.reference = perturbed(ours.model)
        results.append((ours.grpo_backward(batch, rewards), gradients(ours.model)))
    whole, expected = results[-1]
    for stats, grads in results[:-1]:
        assert stats.loss == pytest.approx(whole.loss, rel=1e-10)
        assert stats.kl == pytest.approx(whole.kl, rel=1e-10)
        assert stats.entropy == pytest.approx(whole.entropy, rel=1e-10)
        assert_same_gradients(grads, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_cross_entropy_is_a_global_token_mean(budget) -> None:
    batch = groups(4, 2)
    ours, theirs = student(micro_batch_tokens=budget), student()
    stats = ours.seqkd_backward(batch)
    logprobs = [token_logprobs(theirs.model, g.prompt.token_ids, g.teacher.token_ids, 1.0) for g in batch]
    loss = -torch.cat(logprobs).mean()
    loss.backward()
    assert stats.ce == pytest.approx(loss.item(), rel=1e-10)
    assert_same_gradients(gradients(ours.model), gradients(theirs.model), rtol=1e-8, atol=1e-12)


def test_end_marker_is_a_target() -> None:
    (group,) = groups(1, 2)
    assert group.teacher.token_ids[-1] == 2
    batch = GroupedBatch.of([GroupTokens(group.prompt.token_ids, (group.teacher.token_ids,))], last_tokens=False)
    assert batch.targets[-1] == 2 and len(batch.targets) == len(group.teacher.token_ids)


def test_entropy_and_temperature() -> None:
    (group,) = groups(1, 2)
    ours = student(kl_coef=0.0)
    sample = group.samples[0]
    batch = GroupedBatch.of([GroupTokens(group.prompt.token_ids, (sample.token_ids,))], last_tokens=False)
    for temperature in (0.5, 0.8, 1.0):
        logprob = ours.logprobs(ours.model, batch, temperature)
        expected = token_logprobs(ours.model, group.prompt.token_ids, sample.token_ids, temperature)
        torch.testing.assert_close(logprob, expected)
    stats = ours.grpo_backward([group], [[0.0, 1.0]])
    entropies = []
    for sample in group.samples:
        row = torch.tensor([[*group.prompt.token_ids, *sample.token_ids]])
        logits = ours.model(row).logits[0, len(group.prompt.token_ids) - 1 : -1] / ours.temperature
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    assert stats.entropy == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-6)


def test_reference_is_the_student_when_it_was_frozen() -> None:
    ours = student()
    ours.freeze_reference()
    before = {n: p.clone() for n, p in ours.model.named_parameters()}
    first = ours.grpo_backward(groups(2, 3), [[1.0, 2.0, 4.0]] * 2)
    assert first.kl == 0
    ours.step(1e-2)
    assert ours.grpo_backward(groups(2, 3), [[1.0, 2.0, 4.0]] * 2).kl > 0
    assert ours.reference is not None
    for name, p in ours.reference.named_parameters():
        assert torch.equal(p, before[name]) and not p.requires_grad


def test_gradient_that_is_not_finite_is_refused_and_changes_nothing() -> None:
    ours = student(kl_coef=0.0)
    before = {n: p.clone() for n, p in ours.model.named_parameters()}
    ours.grpo_backward(groups(2, 3), [[1.0, float("inf"), 4.0]] * 2)
    with pytest.raises(UserError, match="gradient of the student is not finite"):
        ours.step(1e-2)
    assert all(torch.equal(p, before[n]) for n, p in ours.model.named_parameters())


@pytest.mark.parametrize("floor", [1e-6, 0.5])
def test_advantages_are_divided_by_the_spread_and_its_floor(floor) -> None:
    rewards = [[1.0, 2.0, 6.0], [4.0, 4.0], [0.1, 0.1001]]
    ours = student()
    ours.algorithm = AlgorithmSettings(advantage_std_floor=floor)
    advantages = ours.advantages(rewards, [3, 2, 2]).split([3, 2, 2])
    for got, group in zip(advantages, rewards, strict=True):
        mean = sum(group) / len(group)
        std = (sum((r - mean) ** 2 for r in group) / (len(group) - 1)) ** 0.5
        assert got.tolist() == pytest.approx([(r - mean) / (std + floor) for r in group], rel=1e-9, abs=1e-12)
    # A group that hardly differs gets full advantages from the paper's floor, and next to none from a real one.
    assert (advantages[2].abs().max() > 0.5) == (floor == 1e-6)


def test_advantages_may_stay_undivided() -> None:
    ours = student()
    ours.algorithm = AlgorithmSettings(normalise_advantage=False, advantage_std_floor=0.5)
    assert ours.advantages([[1.0, 2.0, 6.0], [5.0]], [3, 1]).tolist() == [-2.0, -1.0, 3.0, 0.0]
