"""SODA against a literal DPO: the loss, what is reported of it, every gradient, however the batch is cut."""

from __future__ import annotations

import math

import pytest
import torch

from gadcore.kernels.layout import GroupLayout
from gadcore.models.preference import dpo_loss, preference_backward, sequence_logprobs
from tests.exactness.test_student import TOLERANCE, perturbed
from tests.support import naive
from tests.support.builders import assert_same_gradients, gradients, groups, student

BETA = 0.3


def as_tuples(batch):
    return [(g.prompt.token_ids, g.teacher.token_ids, [s.token_ids for s in g.samples]) for g in batch]


def reference_of(model, batch) -> list[list[float]]:
    with torch.no_grad():
        return [
            [naive.token_logprobs(model, g.prompt.token_ids, r.token_ids, 1.0).sum().item() for r in each]
            for g in batch
            for each in [[g.teacher, *g.samples]]
        ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("qwen2", True)])
def test_soda_equals_a_literal_dpo(dtype, kind, tied) -> None:
    batch = groups(3, 3, ragged=True)
    ours, theirs = (student(dtype, kind=kind, tied=tied) for _ in range(2))
    frozen = perturbed(theirs.model)

    loss = naive.dpo_loss(theirs.model, frozen, as_tuples(batch), BETA)
    loss.backward()
    stats = preference_backward(ours, batch, reference_of(frozen, batch), BETA)

    assert stats.loss == pytest.approx(loss.item(), rel=1e-9 if dtype == torch.float64 else 1e-4)
    assert_same_gradients(gradients(ours.model), gradients(theirs.model), **TOLERANCE[dtype])


def test_what_is_reported_of_it() -> None:
    batch, ours = groups(3, 3, ragged=True), student()
    frozen = perturbed(ours.model)
    stats = preference_backward(ours, batch, reference_of(frozen, batch), BETA)
    own, known = reference_of(ours.model, batch), reference_of(frozen, batch)
    h = [[BETA * (a - b) for a, b in zip(*row, strict=True)] for row in zip(own, known, strict=True)]
    pairs = [(teacher, sample) for teacher, *samples in h for sample in samples]
    assert stats.margin == pytest.approx(sum(t - s for t, s in pairs) / len(pairs))
    assert stats.teacher == pytest.approx(sum(t for t, _ in pairs) / len(pairs))
    assert stats.student == pytest.approx(sum(s for _, s in pairs) / len(pairs))
    assert stats.accuracy == pytest.approx(sum(t > s for t, s in pairs) / len(pairs))
    assert 0 < stats.accuracy < 1


def test_groups_that_are_cut_change_nothing() -> None:
    """Budgets at which every pair, and some pairs, of a group have their prompt and teacher again."""
    batch = groups(5, 4, ragged=True)
    reference = reference_of(perturbed(student().model), batch)
    results = []
    for budget in (1, 60, 150, 10**6):
        ours = student(micro_batch_tokens=budget)
        results.append((preference_backward(ours, batch, reference, BETA), gradients(ours.model)))
    whole, expected = results[-1]
    for stats, grads in results[:-1]:
        for name in ("loss", "accuracy", "margin", "teacher", "student"):
            assert getattr(stats, name) == pytest.approx(getattr(whole, name), rel=1e-10)
        assert_same_gradients(grads, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_reference_log_probs_are_those_of_each_sequence_alone(budget) -> None:
    batch, ours = groups(4, 3, ragged=True), student(micro_batch_tokens=budget)
    found, expected = sequence_logprobs(ours, batch), reference_of(ours.model, batch)
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-10)
    assert all(p.grad is None for p in ours.model.parameters())


def test_a_student_that_has_not_moved_prefers_nothing() -> None:
    batch, ours = groups(3, 3), student()
    stats = preference_backward(ours, batch, sequence_logprobs(ours, batch), BETA)
    assert stats.loss == pytest.approx(math.log(2), rel=1e-9)
    assert abs(stats.margin) < 1e-9 and abs(stats.student) < 1e-9


def test_a_response_that_equals_the_teachers_pulls_nowhere() -> None:
    (group,) = groups(1, 2)
    group.samples = [group.teacher, group.teacher]
    ours = student()
    stats = preference_backward(ours, [group], [[-3.0, -3.0, -3.0]], BETA)
    assert stats.margin == 0 and stats.accuracy == 0.5
    assert max(g.abs().max().item() for g in gradients(ours.model).values()) < 1e-12


def test_gradient_of_the_loss_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    layout = GroupLayout.of([2, 0, 1, 3], teacher=[True, True, True, False])
    logprob, reference = (torch.randn(9, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(
        lambda x: dpo_loss(x, reference, layout, 0.7).loss, (logprob.clone().requires_grad_(),)
    )
    value = dpo_loss(logprob, reference, layout, 0.7)
    h = 0.7 * (logprob - reference)
    pairs = [(0, 1), (0, 2), (4, 5)]
    assert value.loss.item() == pytest.approx(sum(torch.log1p(torch.exp(-(h[t] - h[s]))).item() for t, s in pairs))
    assert value.margin[[0, 3, 4, 6, 7, 8]].tolist() == [0.0] * 6


def test_reference_of_other_groups_is_refused() -> None:
    batch = groups(2, 3)
    with pytest.raises(ValueError, match="a log-prob for the teacher and for every sample"):
        preference_backward(student(), batch, [[0.0] * 4, [0.0] * 3], BETA)
