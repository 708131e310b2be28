"""The held-out evaluation inside a run: how teacher-like the student is, by counting and by D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from gadcore.data.groups import Group
from gadcore.measure import style
from gadcore.measure.diversity import distinct_of_samples, distinct_values, repetition
from gadcore.measure.likeness import NGRAMS, length_ratio, ngram_f1, rouge_l, words
from gadcore.models.discriminator import Discriminator

# A response that says the same three words twice: what cross-entropy leaves in a student and no stage trains against.
REPEATED = 3


def evaluate(
    groups: Sequence[Group], discriminator: Discriminator | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(figures, a row per prompt with its texts and the same figures) over groups with the same number of samples each.

    A figure is the mean over samples, then over prompts, so that prompts can be paired between evaluations. rouge_l,
    ngram_f1, length_ratio: beside the teacher's response. cut_share, repeated: shares of samples that were cut, and in
    which a 3-gram of words occurs twice. distinct_2: over one sample to each prompt (gadcore.measure.diversity). words:
    of a sample. style, word_range: shares of the rules of style that samples keep, of all and of the one on length;
    style_checks: of each that applies (gadcore.measure.style). teacher: `repeated`, `distinct_2`, `words`, `style` of
    the teacher's own. margin, accuracy: of D between the teacher's response and the samples; absent without one.
    """
    within = style.word_range([group.teacher.text for group in groups])
    rows = [_row(group, within) for group in groups]
    distinct = distinct_of_samples([[sample.text for sample in group.samples] for group in groups], 2)
    for row, values in zip(rows, distinct, strict=True):
        row["distinct_2"] = fmean(values)
    names = ("rouge_l", "length_ratio", "cut_share", "repeated", "distinct_2", "words", "style", "word_range")
    result: dict[str, Any] = {name: fmean(row[name] for row in rows) for name in names}
    result["ngram_f1"] = {str(n): fmean(row["ngram_f1"][str(n)] for row in rows) for n in NGRAMS}
    result["style_checks"] = _by_check([row["style_checks"] for row in rows])
    result |= {"rows": len(groups), "samples": len(groups[0].samples), "teacher": _teacher(groups, within)}
    if discriminator is not None:
        scores = discriminator.score(groups, backward=False)
        result |= {"margin": scores.margin, "accuracy": scores.accuracy}
        for row, teacher, rewards in zip(rows, scores.teacher_scores, scores.rewards, strict=True):
            row |= {"teacher_score": teacher, "student_score": fmean(rewards)}
            row |= {"margin": teacher - fmean(rewards), "accuracy": fmean(teacher > reward for reward in rewards)}
            for sample, reward in zip(row["samples"], rewards, strict=True):
                sample["score"] = reward
    return result, rows


def _row(group: Group, within: tuple[float, float]) -> dict[str, Any]:
    reference, texts = group.teacher.text, [sample.text for sample in group.samples]
    prompt = group.prompt.messages[-1]["content"]
    kept = [style.checks(s.text, s.finished, prompt, reference, within) for s in group.samples]
    return {
        "prompt": prompt,
        "teacher": reference,
        "student": texts[0],
        "teacher_finished": group.teacher.finished,
        "samples": [{"text": sample.text, "finished": sample.finished} for sample in group.samples],
        "rouge_l": fmean(rouge_l(text, reference) for text in texts),
        "ngram_f1": {str(n): fmean(ngram_f1(text, reference, n) for text in texts) for n in NGRAMS},
        "length_ratio": fmean(length_ratio(text, reference) for text in texts),
        "cut_share": fmean(not sample.finished for sample in group.samples),
        "repeated": fmean(map(_repeats, texts)),
        "words": fmean(len(words(text)) for text in texts),
        "style": fmean(map(style.score, kept)),
        "word_range": fmean(each["word_range"] for each in kept),
        "style_checks": _by_check(kept),
    }


def _by_check(kept: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """{check: mean of those to which it applies}."""
    return {name: fmean(of) for name in style.CHECKS if (of := [each[name] for each in kept if name in each])}


def _teacher(groups: Sequence[Group], within: tuple[float, float]) -> dict[str, float]:
    texts = [group.teacher.text for group in groups]
    kept = [
        style.checks(g.teacher.text, g.teacher.finished, g.prompt.messages[-1]["content"], g.teacher.text, within)
        for g in groups
    ]
    return {
        "repeated": fmean(map(_repeats, texts)),
        "distinct_2": fmean(distinct_values(texts, 2)),
        "words": fmean(len(words(text)) for text in texts),
        "style": fmean(map(style.score, kept)),
    }


def _repeats(text: str) -> bool:
    return repetition(text, REPEATED) > 0
