"""Opt-in regularisers of what the student is paid for.

    clip    r = D(x, y_t) + clip(D(x, y_s) - D(x, y_t), -c, c)       algorithm.score_clip
    length  r = r - b log(1 + tokens of y_s)                         algorithm.length_debias = b, or "fit"

With "fit", b is the least-squares slope of r over log(1 + tokens) among the samples of every group of this batch, whose
lengths count from the group's mean: no trend in the length is left, whichever way D leans while it learns.

The Bradley-Terry loss knows scores up to a constant of the prompt alone, so a clip of the score itself would depend on
that constant: it is the distance from the teacher's score that is clipped. The one of D's own loss,
discriminator.score_l2, stands beside that (gadcore.models.discriminator.score_penalty).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from gadcore.config.settings import AlgorithmSettings
from gadcore.data.groups import Group
from gadcore.models.discriminator import Scores


def shaped(groups: Sequence[Group], scores: Scores, settings: AlgorithmSettings) -> list[list[float]] | None:
    """The rewards that clip and length debias make of D's scores, per group one a sample; None where neither is on."""
    clip, debias = settings.score_clip, settings.length_debias
    if clip is None and debias == 0:
        return None
    rewards = scores.rewards
    if clip is not None:
        rewards = [
            [teacher + min(max(score - teacher, -clip), clip) for score in own]
            for own, teacher in zip(rewards, scores.teacher_scores, strict=True)
        ]
    lengths = [[math.log1p(len(sample.token_ids)) for sample in group.samples] for group in groups]
    if debias == "fit":
        # From its group's mean, so that rewards stay at the level of the scores from step to step.
        lengths = [[length - fmean(those) for length in those] for those in lengths]
        b = within_slope(rewards, lengths)
    else:
        b = debias
    return [
        [score - b * length for score, length in zip(own, those, strict=True)]
        for own, those in zip(rewards, lengths, strict=True)
    ]


def within_slope(values: Sequence[Sequence[float]], over: Sequence[Sequence[float]]) -> float:
    """The least-squares slope of values over `over`, one for all rows, with an offset of every row's own; 0 where no
    row of `over` varies. The mean of every row of `over` is 0."""
    cross = sum(y * x for own, those in zip(values, over, strict=True) for y, x in zip(own, those, strict=True))
    square = sum(x * x for those in over for x in those)
    return cross / square if square > 1e-12 else 0.0
