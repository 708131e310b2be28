"""The held-out evaluation inside a run: how teacher-like the student is, by counting and by D."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from gadcore.data.groups import Group
from gadcore.measure.likeness import length_ratio, likeness, rouge_l
from gadcore.models.discriminator import Discriminator


def evaluate(
    groups: Sequence[Group], discriminator: Discriminator | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures over groups that hold one sample each, and a row per prompt for side-by-side reading.

    margin, accuracy: of D between each teacher response and the sample; absent without a discriminator.
    """
    candidates = [group.samples[0].text for group in groups]
    references = [group.teacher.text for group in groups]
    result = dict(likeness(candidates, references))
    result["cut_share"] = fmean(not group.samples[0].finished for group in groups)
    rows: list[dict[str, Any]] = [
        {
            "prompt": group.prompt.messages[-1]["content"],
            "teacher": reference,
            "student": candidate,
            "rouge_l": rouge_l(candidate, reference),
            "length_ratio": length_ratio(candidate, reference),
            "finished": group.samples[0].finished,
        }
        for group, candidate, reference in zip(groups, candidates, references, strict=True)
    ]
    if discriminator is not None:
        scores = discriminator.score(groups, backward=False)
        result |= {"margin": scores.margin, "accuracy": scores.accuracy}
        for row, teacher, rewards in zip(rows, scores.teacher_scores, scores.rewards, strict=True):
            row |= {"teacher_score": teacher, "student_score": rewards[0]}
    return result, rows
