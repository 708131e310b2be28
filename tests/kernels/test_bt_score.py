"""Scores, the Bradley-Terry loss and the layout of groups against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gadcore.kernels.bt_score import bt_score
from gadcore.kernels.layout import GroupLayout

F64 = torch.float64
# Groups: teacher + 2 samples; 3 samples without a teacher; teacher + 1 sample; a teacher alone.
MIXED = GroupLayout.of([2, 3, 1, 0], teacher=[True, False, True, True])
PAIRS = [(0, 1), (0, 2), (6, 7)]


def inputs(layout: GroupLayout, width: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden with rows that no sequence ends in, last_index out of order, weight, bias."""
    generator = torch.Generator().manual_seed(1)
    sequences = layout.sequences
    hidden = torch.randn(2 * sequences, width, generator=generator, dtype=F64)
    last_index = torch.randperm(2 * sequences, generator=generator)[:sequences]
    return hidden, last_index, torch.randn(width, generator=generator, dtype=F64), torch.tensor(0.7, dtype=F64)


def of_scores(*scores: float, layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """margin and accuracy of the pairs among sequences with these scores."""
    hidden = torch.tensor(scores, dtype=F64)[:, None]
    result = bt_score(hidden, torch.arange(len(scores)), torch.ones(1, dtype=F64), None, layout, denominator=1)
    return result.margin[result.paired], result.accuracy[result.paired]


def test_layout_of_uniform_groups() -> None:
    with_teacher = GroupLayout.of([2, 1, 3], teacher=True)
    assert with_teacher.group_offsets.tolist() == [0, 3, 5, 9]
    assert with_teacher.group_of.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert with_teacher.is_teacher.nonzero().flatten().tolist() == [0, 3, 5]
    without = GroupLayout.of([2, 1, 3], teacher=False)
    assert without.group_offsets.tolist() == [0, 2, 3, 6]
    assert without.group_of.tolist() == [0, 0, 1, 2, 2, 2]
    assert not without.is_teacher.any() and not without.has_teacher.any()


def test_layout_of_mixed_groups() -> None:
    assert MIXED.group_of.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3]
    assert MIXED.is_teacher.nonzero().flatten().tolist() == [0, 6, 8]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("denominator", [3, 11])
def test_ragged_groups_some_without_a_teacher(with_bias: bool, denominator: float) -> None:
    hidden, last_index, weight, bias = inputs(MIXED)
    result = bt_score(hidden, last_index, weight, bias if with_bias else None, MIXED, denominator=denominator)
    scores = [
        sum(h * w for h, w in zip(hidden[i].tolist(), weight.tolist(), strict=True)) + 0.7 * with_bias
        for i in last_index.tolist()
    ]
    assert result.scores.tolist() == pytest.approx(scores, rel=1e-12)
    margins = [scores[t] - scores[s] for t, s in PAIRS]
    assert result.paired.nonzero().flatten().tolist() == [s for _, s in PAIRS]
    assert result.margin[result.paired].tolist() == pytest.approx(margins, rel=1e-12)
    assert result.margin[~result.paired].eq(0).all() and result.accuracy[~result.paired].eq(0).all()
    loss = sum(math.log1p(math.exp(-m)) for m in margins) / denominator
    assert result.loss.item() == pytest.approx(loss, rel=1e-12)
    assert result.accuracy[result.paired].tolist() == [float(m > 0) for m in margins]
    assert not result.margin.requires_grad and not result.accuracy.requires_grad


def test_gradcheck() -> None:
    hidden, last_index, weight, bias = (each.requires_grad_(each.dtype == F64) for each in inputs(MIXED))

    def scores_and_loss(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        result = bt_score(h, last_index, w, b, MIXED, denominator=3)
        return result.scores, result.loss

    assert torch.autograd.gradcheck(scores_and_loss, (hidden, weight, bias))


def test_the_teacher_gets_the_gradient_of_all_its_pairs_and_the_bias_none() -> None:
    hidden, last_index, weight, bias = inputs(MIXED)
    hidden.requires_grad_(), bias.requires_grad_()
    result = bt_score(hidden, last_index, weight, bias, MIXED, denominator=3)
    result.loss.backward()
    expected = torch.zeros_like(hidden)
    for (t, s), margin in zip(PAIRS, result.margin[result.paired], strict=True):
        slope = -torch.sigmoid(-margin) / 3 * weight
        expected[last_index[t]] += slope
        expected[last_index[s]] -= slope
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-12, atol=1e-15)
    assert bias.grad is not None and bias.grad.abs() < 1e-15


def test_a_tie_counts_as_half_a_correct_pair() -> None:
    margin, accuracy = of_scores(2.0, 1.0, 2.0, 3.0, layout=GroupLayout.of([3], teacher=True))
    assert margin.tolist() == [1.0, 0.0, -1.0]
    assert accuracy.tolist() == [1.0, 0.5, 0.0]


def test_groups_without_any_teacher_are_scored_and_have_no_loss() -> None:
    layout = GroupLayout.of([2, 3], teacher=False)
    hidden, last_index, weight, bias = inputs(layout)
    result = bt_score(hidden, last_index, weight, bias, layout, denominator=5)
    assert result.scores.shape == (5,) and result.loss == 0
    assert not result.paired.any() and result.margin.eq(0).all() and result.accuracy.eq(0).all()


@pytest.mark.parametrize("score", [1e4, -1e4])
def test_huge_margins_stay_finite(score: float) -> None:
    hidden = torch.tensor([[score], [0.0]], requires_grad=True)
    layout = GroupLayout.of([1], teacher=True)
    result = bt_score(hidden, torch.arange(2), torch.ones(1), None, layout, denominator=1)
    result.loss.backward()
    assert result.loss.item() == max(0.0, -score)
    assert hidden.grad is not None and hidden.grad.flatten().tolist() == ([0, 0] if score > 0 else [-1, 1])


def test_bf16_hidden_states_give_fp32_scores() -> None:
    hidden, last_index, weight, bias = (each.bfloat16() if each.dtype == F64 else each for each in inputs(MIXED, 64))
    hidden.requires_grad_()
    result = bt_score(hidden, last_index, weight, bias, MIXED, denominator=3)
    result.loss.backward()
    assert result.scores.dtype == result.loss.dtype == result.margin.dtype == result.accuracy.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16
    exact = hidden.detach().double()[last_index] @ weight.double() + bias.double()
    torch.testing.assert_close(result.scores.double(), exact, rtol=1e-6, atol=1e-5)
    assert (result.scores.bfloat16().double() - exact).abs().max() > 1e-3


def test_equal_rows_score_equally_to_the_bit_wherever_they_lie() -> None:
    generator = torch.Generator().manual_seed(2)
    for sequences in (2, 5, 17):
        hidden = torch.randn(1, 577, generator=generator).repeat(sequences, 1)
        layout = GroupLayout.of([sequences - 1], teacher=True)
        weight = torch.randn(577, generator=generator)
        result = bt_score(hidden, torch.arange(sequences), weight, None, layout, denominator=1)
        assert (result.scores == result.scores[0]).all() and (result.accuracy[1:] == 0.5).all()
