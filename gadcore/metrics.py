"""What a step's results say, as flat figures for metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np

from gadcore.discriminator import Judgement
from gadcore.evaluate.diversity import repetition
from gadcore.groups import Group
from gadcore.student import PolicyStats, SeqKDStats


def step_metrics(
    groups: Sequence[Group],
    stats: PolicyStats | SeqKDStats | None,
    student_norm: float | None,
    judgement: Judgement | None,
    discriminator_norm: float | None,
) -> dict[str, float]:
    """Figures of one step, without times. Lengths are in tokens of the student's vocabulary.

    A judgement without a discriminator_norm is of a discriminator that was not updated: nothing was trained on it.
    """
    values: dict[str, float] = {}
    trained = 0
    if isinstance(stats, PolicyStats):
        values |= {
            "student/loss": stats.loss,
            "student/kl": stats.kl,
            "student/entropy": stats.entropy,
            "student/clip_fraction": stats.clip_fraction,
            "student/ratio_max": stats.ratio_max,
            "sampler/logprob_diff_mean": stats.logprob_diff_mean,
            "sampler/logprob_diff_max": stats.logprob_diff_max,
        }
    elif isinstance(stats, SeqKDStats):
        values["student/ce"] = stats.ce
    if stats is not None and student_norm is not None:
        values |= {"student/grad_norm": student_norm, "tokens/student": stats.tokens}
        trained += stats.tokens
    if judgement is not None:
        values |= {
            "discriminator/loss": judgement.loss,
            "discriminator/accuracy": judgement.accuracy,
            "discriminator/margin": judgement.margin,
            "tokens/discriminator": judgement.tokens,
        }
        values |= _sample_metrics(groups, judgement)
        if discriminator_norm is not None:
            values["discriminator/grad_norm"] = discriminator_norm
            trained += judgement.tokens
    values["tokens/trained"] = trained
    return values


def _sample_metrics(groups: Sequence[Group], judgement: Judgement) -> dict[str, float]:
    lengths = [len(s.token_ids) for g in groups for s in g.samples]
    rewards = [r for group in judgement.rewards for r in group]
    student, teacher = fmean(lengths), fmean(len(g.teacher.token_ids) for g in groups)
    return {
        "reward/mean": fmean(rewards),
        "reward/std": fmean(stdev(group) for group in judgement.rewards),
        "reward/length_corr": correlation(rewards, lengths),
        "length/student": student,
        "length/teacher": teacher,
        "length/ratio": student / teacher,
        "length/cut_share": fmean(not s.finished for g in groups for s in g.samples),
        "tokens/sampled": sum(lengths),
    }


def sample_traits(groups: Sequence[Group], judgement: Judgement) -> dict[str, float]:
    """What a reward might go with instead of quality, for gadcore.health.

    reward/finished_gap: mean reward of finished minus that of cut samples; reward/finished_corr: correlation of reward
    and "finished", each with its group's mean reward taken off. Both are absent where a step has only one kind.
    samples/repetition: share of the 4-grams of words of a sample that it has had before, mean over samples.
    """
    samples = [sample for group in groups for sample in group.samples]
    values = {"samples/repetition": fmean(repetition(sample.text) for sample in samples)}
    finished = [sample.finished for sample in samples]
    if any(finished) and not all(finished):
        # Prompts differ in level and in how often their responses are cut, which would count as a gap.
        centred = [r - fmean(group) for group in judgement.rewards for r in group]
        ended = [r for r, f in zip(centred, finished, strict=True) if f]
        cut = [r for r, f in zip(centred, finished, strict=True) if not f]
        values["reward/finished_gap"] = fmean(ended) - fmean(cut)
        values["reward/finished_corr"] = correlation(centred, [float(f) for f in finished])
    return values


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one side does not vary."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
