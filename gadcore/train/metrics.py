"""What a step's results say, as flat figures for metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

import numpy as np

from gadcore.measure.diversity import repetition
from gadcore.memory.holdings import WORK_OF
from gadcore.models.preference import PreferenceStats
from gadcore.models.student import PolicyStats, SeqKDStats
from gadcore.train.step import StepResult


def step_metrics(result: StepResult) -> dict[str, float]:
    """Figures of one step, without times. Lengths are in tokens of the student's vocabulary.

    Scores without a discriminator_norm are of a discriminator that was not updated: nothing was trained on it.
    """
    stats, scores = result.stats, result.scores
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
            "sampler/far_share": stats.logprob_far_share,
            "sampler/kl": stats.sampler_kl,
        }
        # Only where importance weights have a cap.
        capped = getattr(stats, "capped_share", None)
        if capped is not None:
            values["sampler/capped_share"] = capped
    elif isinstance(stats, PreferenceStats):
        figures = ("loss", "accuracy", "margin", "teacher", "student")
        values |= {f"preference/{name}": getattr(stats, name) for name in figures} | lengths(result)
    elif isinstance(stats, SeqKDStats):
        values["student/ce"] = stats.ce
    if stats is not None and result.student_norm is not None:
        values |= {"student/grad_norm": result.student_norm, "tokens/student": stats.tokens}
        trained += stats.tokens
    if scores is not None:
        values |= {
            "discriminator/loss": scores.loss,
            "discriminator/accuracy": scores.accuracy,
            "discriminator/margin": scores.margin,
            "tokens/discriminator": scores.tokens,
        }
        values |= _sample_metrics(result)
        # Rare, and of interest only where they are there.
        odd = {"discriminator/cut_samples": scores.cut, "discriminator/empty_samples": scores.empty}
        values |= {name: count for name, count in odd.items() if count}
        if result.discriminator_norm is not None:
            values["discriminator/grad_norm"] = result.discriminator_norm
            trained += scores.tokens
    values["tokens/trained"] = trained
    return values


def step_costs(
    values: Mapping[str, float], taken: Mapping[str, float], memory: Mapping[str, float], *, meanwhile: bool
) -> dict[str, float]:
    """Memory, seconds and rates of a step. values: step_metrics(). taken: its seconds by phase. meanwhile: of a sampler
    that works beside the trainer the rollout's seconds are those that were waited for it, which are no rate."""
    costs = {**memory, **{f"time/{name}": seconds for name, seconds in taken.items()}}
    costs["time/total"] = sum(taken.values())
    work = {**({} if meanwhile else {"rollout": "sampled"}), **{model: model for model in WORK_OF}}
    for name, tokens in work.items():
        seconds = sum(taken.get(phase, 0.0) for phase in WORK_OF.get(name, (name,)))
        if seconds and f"tokens/{tokens}" in values:
            costs[f"perf/{name}_tokens_per_s"] = values[f"tokens/{tokens}"] / seconds
    return costs


def _sample_metrics(result: StepResult) -> dict[str, float]:
    groups, by_group = result.groups, result.rewards_by_group()
    tokens = [len(s.token_ids) for g in groups for s in g.samples]
    rewards = [r for group in by_group for r in group]
    return {
        "reward/mean": fmean(rewards),
        "reward/std": fmean(stdev(group) for group in by_group),
        "reward/length_corr": correlation(rewards, tokens),
        **lengths(result),
        "tokens/sampled": sum(tokens),
    }


def lengths(result: StepResult) -> dict[str, float]:
    """Of the batch's samples beside the teacher's responses."""
    samples = [sample for group in result.groups for sample in group.samples]
    student = fmean(len(sample.token_ids) for sample in samples)
    teacher = fmean(len(group.teacher.token_ids) for group in result.groups)
    return {
        "length/student": student,
        "length/teacher": teacher,
        "length/ratio": student / teacher,
        "length/cut_share": fmean(not sample.finished for sample in samples),
    }


def sample_traits(result: StepResult) -> dict[str, float]:
    """What a reward might go with instead of quality, for gadcore.record.health.

    reward/finished_gap: mean reward of finished minus that of cut samples; reward/finished_corr: correlation of reward
    and "finished", each with its group's mean reward taken off. Both are absent where a step has only one kind.
    samples/repetition: share of the 4-grams of words of a sample that it has had before, mean over samples.
    Nothing where nothing was scored.
    """
    if result.scores is None:
        return {}
    groups, by_group = result.groups, result.rewards_by_group()
    samples = [sample for group in groups for sample in group.samples]
    values = {"samples/repetition": fmean(repetition(sample.text) for sample in samples)}
    finished = [sample.finished for sample in samples]
    if any(finished) and not all(finished):
        # Prompts differ in level and in how often their responses are cut, which would count as a gap.
        centred = [r - fmean(group) for group in by_group for r in group]
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
