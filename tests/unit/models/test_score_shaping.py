"""Regularisers of scores and rewards: what each computes, its gradient, and that it is off by default."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from examples import my_checked_reward
from gadcore.config.settings import AlgorithmSettings, DiscriminatorSettings
from gadcore.kernels.layout import GroupLayout
from gadcore.models.bt_loss import score_penalty
from gadcore.models.discriminator import Scores
from gadcore.models.score_shaping import shaped
from gadcore.train.reward import rewards_by
from tests.support.builders import assert_same_gradients, discriminator, gradients, groups
from tests.support.naive import score


@pytest.mark.parametrize("budget", [1, 150, 10**6])
def test_l2_is_added_to_the_loss_however_groups_are_cut(tmp_path, budget) -> None:
    batch = groups(4, 3, ragged=True)
    ours, theirs = discriminator(tmp_path, micro_batch_tokens=budget), discriminator(tmp_path)
    ours.settings = DiscriminatorSettings(score_l2=0.3)
    found = ours.score(batch, backward=True)
    losses = []
    for group in batch:
        teacher = score(theirs.model, group.prompt.token_ids, group.teacher.token_ids)
        for sample in group.samples:
            own = score(theirs.model, group.prompt.token_ids, sample.token_ids)
            losses.append(torch.log1p(torch.exp(own - teacher)) + 0.3 * (teacher**2 + own**2))
    loss = torch.stack(losses).mean()
    loss.backward()
    assert found.loss == pytest.approx(loss.item(), rel=1e-9)
    assert_same_gradients(gradients(ours.model), gradients(theirs.model), rtol=1e-8, atol=1e-11)


def test_the_penalty_counts_pairs_alone() -> None:
    layout = GroupLayout.of([2, 0, 2], teacher=[True, True, False])
    scores = torch.tensor([1.0, 2.0, -3.0, 5.0, 7.0, 7.0], dtype=torch.float64, requires_grad=True)
    penalty = score_penalty(scores, layout)
    assert penalty.item() == (1 + 4) + (1 + 9)
    (gradient,) = torch.autograd.grad(penalty, scores)
    assert gradient.tolist() == [4.0, 4.0, -6.0, 0.0, 0.0, 0.0]


def test_it_is_off_by_default(tmp_path) -> None:
    batch = groups(2, 3)
    plain, zero = discriminator(tmp_path, torch.float32), discriminator(tmp_path, torch.float32)
    zero.settings = DiscriminatorSettings(score_l2=0.0)
    assert plain.score(batch, backward=True) == zero.score(batch, backward=True)
    assert shaped(batch, Scores.of([[1.0, 2.0, 3.0]] * 2, [0.0, 0.0]), AlgorithmSettings()) is None


def test_clip_and_length_debias() -> None:
    batch = groups(2, 3)
    scores = Scores.of([[-9.0, 1.0, 4.0], [0.5, 1.0, 1.5]], [1.0, 1.0])
    lengths = [[math.log(1 + len(s.token_ids)) for s in g.samples] for g in batch]
    assert shaped(batch, scores, AlgorithmSettings(score_clip=2.0)) == [[-1.0, 1.0, 3.0], [0.5, 1.0, 1.5]]
    debiased = shaped(batch, scores, AlgorithmSettings(length_debias=0.5))
    assert debiased is not None
    for row, own, of in zip(debiased, scores.rewards, lengths, strict=True):
        assert row == pytest.approx([s - 0.5 * length for s, length in zip(own, of, strict=True)])
    both = shaped(batch, scores, AlgorithmSettings(score_clip=2.0, length_debias=-0.5))
    assert both is not None and both[0] == pytest.approx([-1 + 0.5 * lengths[0][0], 1 + 0.5 * lengths[0][1],
                                                          3 + 0.5 * lengths[0][2]])  # fmt: skip


def test_the_fitted_debias_leaves_no_trend_in_the_length() -> None:
    batch = groups(3, 4)
    lengths = [[math.log(1 + len(s.token_ids)) for s in g.samples] for g in batch]
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).tolist()
    told = [[n + 0.7 * x + k for n, x in zip(noise[k], lengths[k], strict=True)] for k in range(3)]
    rewards = shaped(batch, Scores.of(told, [0.0] * 3), AlgorithmSettings(length_debias="fit"))
    assert rewards is not None
    # By numpy: one slope, an offset for every group.
    rows = [(x, *(float(g == k) for k in range(3))) for g, row in enumerate(lengths) for x in row]
    slope = float(np.linalg.lstsq(np.array(rows), np.array(told).ravel(), rcond=None)[0][0])
    assert abs(slope) > 0.1
    for row, own, of in zip(rewards, told, lengths, strict=True):
        assert row == pytest.approx([s - slope * (x - np.mean(of)) for s, x in zip(own, of, strict=True)])


def test_samples_of_one_length_say_nothing_of_it() -> None:
    (group,) = groups(1, 3)
    group.samples = group.samples[:1] * 3
    told = [[1.0, 2.0, 3.0]]
    assert shaped([group], Scores.of(told, [0.0]), AlgorithmSettings(length_debias="fit")) == told


def test_a_reward_of_ones_own_gets_what_they_leave() -> None:
    batch, scores = groups(1, 3), Scores.of([[-9.0, 1.0, 4.0]], [1.0])
    made = shaped(batch, scores, AlgorithmSettings(score_clip=2.0))
    assert rewards_by(lambda inputs: [2 * s for s in inputs.scores], "m:f", batch, scores, made) == [[-2.0, 2.0, 6.0]]
    assert rewards_by(lambda inputs: inputs.scores, "m:f", batch, scores) == [[-9.0, 1.0, 4.0]]


def test_the_examples_mask_a_format_and_mix_in_what_can_be_checked() -> None:
    (group,) = groups(1, 3)
    texts = ["Two: 1) a; 2) b. So 4.", "Two: 1) a; 3) b. So 5.", "None."]
    group.samples = [replace(s, text=text) for s, text in zip(group.samples, texts, strict=True)]
    group.teacher = replace(group.teacher, text="It is 4.")
    scores = Scores.of([[0.5, 1.0, 0.25]], [1.0])
    assert rewards_by(my_checked_reward.masked, "m:f", [group], scores) == [[0.5, -0.75, 0.25]]
    assert rewards_by(my_checked_reward.mixed, "m:f", [group], scores) == [[2.5, 1.0, 0.25]]
    group.teacher = replace(group.teacher, text="No number.")
    assert rewards_by(my_checked_reward.mixed, "m:f", [group], scores) == [[0.5, 1.0, 0.25]]
