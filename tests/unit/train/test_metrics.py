"""Metrics: which figures a step has, and their values by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gadcore.data.groups import Group, Prompt, Response
from gadcore.models.discriminator import Scores
from gadcore.models.student import PolicyStats, SeqKDStats
from gadcore.train.metrics import correlation, step_costs, step_metrics
from gadcore.train.step import StepResult


def figures(**values: float) -> dict[str, Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


POLICY = PolicyStats(
    figures(
        loss=0.1,
        kl=0.2,
        entropy=0.3,
        clip_fraction=0.4,
        ratio_max=1.5,
        logprob_diff_mean=0.6,
        logprob_diff_max=0.7,
        logprob_far_share=0.25,
        sampler_kl=0.03,
    ),
    tokens=100,
)
SEQKD = SeqKDStats(figures(ce=1.25), tokens=30)
# Of two groups, each with its teacher first: rewards 1, 3 and 0, 0.
SCORES = Scores(
    torch.tensor([2.0, 1.0, 3.0, 5.0, 0.0, 0.0]), [2, 2], figures(loss=0.5, accuracy=0.75, margin=2.5), tokens=40
)

POLICY_VALUES = {
    "student/loss": 0.1,
    "student/kl": 0.2,
    "student/entropy": 0.3,
    "student/clip_fraction": 0.4,
    "student/ratio_max": 1.5,
    "sampler/logprob_diff_mean": 0.6,
    "sampler/logprob_diff_max": 0.7,
    "sampler/far_share": 0.25,
    "sampler/kl": 0.03,
    "student/grad_norm": 0.9,
    "tokens/student": 100,
}
SCORES_VALUES = {
    "discriminator/loss": 0.5,
    "discriminator/accuracy": 0.75,
    "discriminator/margin": 2.5,
    "discriminator/grad_norm": 0.8,
    "tokens/discriminator": 40,
    "reward/mean": 1.0,
    # Unbiased, within the group, then over the groups: (sqrt(2) + 0) / 2.
    "reward/std": 2**0.5 / 2,
    # Rewards 1 3 0 0 and lengths 2 4 3 3: covariance sum 2, square sums 6 and 2.
    "reward/length_corr": 2 / 12**0.5,
    "length/student": 3.0,
    "length/teacher": 4.0,
    "length/ratio": 0.75,
    "length/cut_share": 0.25,
    "tokens/sampled": 12,
}


def response(length: int, finished: bool = True) -> Response:
    return Response("text", tuple(range(length)), finished)


def two_groups() -> list[Group]:
    prompt = Prompt(0, ({"role": "user", "content": "x"},), (1, 2, 3))
    return [
        Group(prompt, response(6), [response(2), response(4, finished=False)]),
        Group(prompt, response(2, finished=False), [response(3), response(3)]),
    ]


def test_a_gad_step() -> None:
    values = step_metrics(StepResult("gad", 1, two_groups(), POLICY, 0.9, SCORES, 0.8))
    assert values == pytest.approx({**POLICY_VALUES, **SCORES_VALUES, "tokens/trained": 140})


def test_odd_samples_are_counted_where_there_are_any() -> None:
    scores = Scores.of([[0.5, 0.1], [0.2, 0.3]], [1.0, 2.0])
    scores.cut, scores.empty = 2, 1
    values = step_metrics(StepResult("gad", 1, two_groups(), POLICY, 0.9, scores, 0.8))
    assert (values["discriminator/cut_samples"], values["discriminator/empty_samples"]) == (2, 1)


def test_a_warmup_step() -> None:
    values = step_metrics(StepResult("warmup", 1, two_groups(), SEQKD, 0.9, SCORES, 0.8))
    student = {"student/ce": 1.25, "student/grad_norm": 0.9, "tokens/student": 30}
    assert values == pytest.approx({**student, **SCORES_VALUES, "tokens/trained": 70})


def test_a_step_of_the_discriminator_alone() -> None:
    values = step_metrics(StepResult("warmup", 1, two_groups(), scores=SCORES, discriminator_norm=0.8))
    assert values == pytest.approx({**SCORES_VALUES, "tokens/trained": 40})


def test_a_seqkd_step_needs_no_samples() -> None:
    groups = [Group(group.prompt, group.teacher) for group in two_groups()]
    values = step_metrics(StepResult("seqkd", 1, groups, SEQKD, 0.9))
    assert values == {"student/ce": 1.25, "student/grad_norm": 0.9, "tokens/student": 30, "tokens/trained": 30}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0, 3.0], [10, 20, 30], 1.0),
        ([1.0, 2.0, 3.0], [3, 2, 1], -1.0),
        ([1.0, -1.0, 1.0, -1.0], [1, 1, 2, 2], 0.0),
        ([2.0, 2.0, 2.0], [1, 2, 3], 0.0),
        ([1.0, 2.0, 3.0], [7, 7, 7], 0.0),
        ([1.5], [4], 0.0),
        ([1e6, 1e6 + 1e-3], [5, 9], 1.0),
    ],
)
def test_correlation(a: list[float], b: list[float], expected: float) -> None:
    value = correlation(a, b)
    assert type(value) is float and value == pytest.approx(expected, abs=1e-12)


def test_rates_are_of_the_phases_that_work_took() -> None:
    taken = {"rollout": 2.0, "discriminator": 1.0, "student": 3.0, "student_update": 1.0}
    tokens = {"tokens/sampled": 100, "tokens/student": 200}
    costs = step_costs(tokens, taken, {"memory/x": 1.0}, meanwhile=False)
    assert costs["memory/x"] == 1.0 and costs["time/total"] == 7.0 and costs["perf/rollout_tokens_per_s"] == 50.0
    assert costs["perf/student_tokens_per_s"] == 50.0 and "perf/discriminator_tokens_per_s" not in costs
    # Of a sampler that works meanwhile only the waiting is known.
    assert "perf/rollout_tokens_per_s" not in step_costs(tokens, taken, {}, meanwhile=True)
