"""A reward of one's own: one file, named by a setting."""

from __future__ import annotations

import math

import pytest

from gadcore.errors import UserError
from gadcore.models.discriminator import Scores
from gadcore.train.reward import RewardInputs, rewards_by
from gadcore.train.step import StepResult
from tests.support.builders import groups


def scores_of(batch) -> Scores:
    return Scores.of([[float(i) for i, _ in enumerate(group.samples)] for group in batch], [9.0] * len(batch))


def test_the_function_sees_texts_and_scores() -> None:
    batch, seen = groups(3, 3), []

    def gate(inputs: RewardInputs) -> list[float]:
        seen.append(inputs)
        return [s if done else -1.0 for s, done in zip(inputs.scores, inputs.finished, strict=True)]

    rewards = rewards_by(gate, "own:gate", batch, scores_of(batch))
    for group, inputs, row in zip(batch, seen, rewards, strict=True):
        assert inputs.messages == group.prompt.messages and inputs.teacher == group.teacher.text
        assert inputs.samples == [s.text for s in group.samples] and inputs.teacher_score == 9.0
        assert row == [float(i) if s.finished else -1.0 for i, s in enumerate(group.samples)]
    result = StepResult("gad", 1, batch, scores=scores_of(batch), rewards=rewards)
    assert result.for_grpo() is rewards and result.rewards_by_group() is rewards


@pytest.mark.parametrize("value", [[1.0], [math.nan] * 3, [1.0] * 4])
def test_rewards_that_do_not_fit(value) -> None:
    batch = groups(2, 3)
    with pytest.raises(UserError, match="algorithm.reward = 'own:f' must return 3 finite numbers .* row 0"):
        rewards_by(lambda inputs: value, "own:f", batch, scores_of(batch))
