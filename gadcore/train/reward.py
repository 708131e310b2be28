"""The door for a reward of one's own: algorithm.reward = "module:function".

The function gets a group's texts with D's scores, and returns one reward a sample: D's score changed, mixed with a
checkable reward, or gated. For example a format that must hold:

    def boxed(inputs):
        return [s if "\\boxed{" in text else min(inputs.scores) - 1 for text, s in zip(inputs.samples, inputs.scores)]

D is trained on its own Bradley-Terry loss all the same; only GRPO sees what the function returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gadcore.data.groups import Group
from gadcore.errors import UserError
from gadcore.models.discriminator import Scores


@dataclass(frozen=True)
class RewardInputs:
    """Of one group.

    messages: the conversation, ({"role": .., "content": ..}, ..). teacher: its response. samples, finished: the
    student's, and whether each ended by itself. scores: D(x, y_s), as algorithm.score_clip and .length_debias leave
    them. teacher_score: D(x, y_t).
    """

    messages: tuple[dict[str, str], ...]
    teacher: str
    samples: list[str]
    finished: list[bool]
    scores: list[float]
    teacher_score: float


Reward = Callable[[RewardInputs], Sequence[float]]


def rewards_by(
    reward: Reward, name: str, groups: Sequence[Group], scores: Scores, shaped: list[list[float]] | None = None
) -> list[list[float]]:
    """The function's rewards, per group one a sample. name: as algorithm.reward has it. shaped: in place of D's scores.

    Raises UserError where it returns another number of them, or one that is not finite.
    """
    rows = []
    for group, own, teacher in zip(groups, shaped or scores.rewards, scores.teacher_scores, strict=True):
        samples = group.samples
        found = reward(
            RewardInputs(
                group.prompt.messages,
                group.teacher.text,
                [s.text for s in samples],
                [s.finished for s in samples],
                own,
                teacher,
            )  # fmt: skip
        )
        values = [float(value) for value in found]
        if len(values) != len(samples) or not all(map(math.isfinite, values)):
            raise UserError(
                f"algorithm.reward = {name!r} must return {len(samples)} finite numbers for the prompt of row "
                f"{group.prompt.index} (from 0), one a sample: got {values}"
            )
        rows.append(values)
    return rows
