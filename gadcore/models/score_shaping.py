"""Opt-in regularisers of what the student is paid for.

    clip    r = D(x, y_t) + clip(D(x, y_s) - D(x, y_t), -c, c)       algorithm.score_clip
    length  r = r - b log(1 + tokens of y_s)                         algorithm.length_debias

The Bradley-Terry loss knows scores up to a constant of the prompt alone, so a clip of the score itself would depend on
that constant: it is the distance from the teacher's score that is clipped. The one of D's own loss,
discriminator.score_l2, stands beside that (gadcore.models.discriminator.score_penalty).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from gadcore.config.settings import AlgorithmSettings
from gadcore.data.groups import Group
from gadcore.models.discriminator import Scores


def shaped(groups: Sequence[Group], scores: Scores, settings: AlgorithmSettings) -> list[list[float]] | None:
    """The rewards that clip and length debias make of D's scores, per group one a sample; None where neither is on."""
    clip, debias = settings.score_clip, settings.length_debias
    if clip is None and debias == 0:
        return None
    rewards = []
    for group, own, teacher in zip(groups, scores.rewards, scores.teacher_scores, strict=True):
        if clip is not None:
            own = [teacher + min(max(score - teacher, -clip), clip) for score in own]
        lengths = [math.log1p(len(sample.token_ids)) for sample in group.samples]
        rewards.append([score - debias * length for score, length in zip(own, lengths, strict=True)])
    return rewards
