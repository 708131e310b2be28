"""Every measure without an API, as a value per prompt (the mean over its responses), their differences and intervals.

The first model is what the others are compared with. Everything is read from the folder of an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from gadcore.errors import UserError
from gadcore.evaluate.judge_rows import JUDGED
from gadcore.evaluate.responses import ResponseRow, by_prompt, read_responses
from gadcore.measure.diversity import distinct_of_samples, repetition
from gadcore.measure.figures import Measure
from gadcore.measure.intervals import bootstrap, difference, wilson
from gadcore.measure.likeness import NGRAMS, length_ratio, ngram_f1, rouge_l, words
from gadcore.measure.style import checks, score, word_range
from gadcore.record.reading import Count, Finite, read_as

# A model's row of results: {measure: {"mean", "interval", "n"}}.
Results = dict[str, dict[str, Any]]
Fresh = Callable[[Sequence[ResponseRow], Path], Mapping[str, Any]]

TEACHER = "teacher"
TEXT_MEASURES = (
    Measure(("rouge_l",), "ROUGE-L", "higher"),
    *(Measure((f"ngram_f1_{n}",), f"{n}-gram F1", "higher") for n in NGRAMS),
    Measure(("style",), "house style", "higher", share=True),
    Measure(("word_range",), "length as the teacher's", "higher", share=True),
    Measure(("length_ratio",), "length ratio", "near 1"),
    Measure(("words",), "words", "as the teacher"),
    Measure(("distinct_1",), "distinct-1", "as the teacher"),
    Measure(("distinct_2",), "distinct-2", "as the teacher"),
    Measure(("repetition",), "repetition", "as the teacher", share=True),
    Measure(("cut_share",), "responses cut", "lower", share=True),
)
FRESH = Measure(("fresh_accuracy",), "fresh D tells apart", "near 50 %", share=True)
# The score by one of several judges is "judge_score <judge>": their figures cannot be compared with each other.
JUDGE_SCORE = "judge_score"


def measures_of(results: Mapping[str, Mapping[str, Any]]) -> list[Measure]:
    """The measures of a set's results by model, one of every judge at the end."""
    judged = sorted({name for found in results.values() for name in found if name.split(" ")[0] == JUDGE_SCORE})
    judges = (Measure((name,), f"judge score by {name.partition(' ')[2] or '?'}", "higher") for name in judged)
    return [*TEXT_MEASURES, FRESH, *judges]


def values_of(rows: Sequence[ResponseRow]) -> dict[str, list[float]]:
    """Every text measure of a model's responses, a value per prompt."""
    texts, references = [row.response for row in rows], [row.reference for row in rows]
    pairs = list(zip(texts, references, strict=True))
    within = word_range([row.reference for row in rows])
    kept = [checks(row.response, row.finished, row.prompt, row.reference, within) for row in rows]
    values = {
        "rouge_l": [rouge_l(*pair) for pair in pairs],
        **{f"ngram_f1_{n}": [ngram_f1(*pair, n) for pair in pairs] for n in NGRAMS},
        **_rules(kept),
        "length_ratio": [length_ratio(*pair) for pair in pairs],
        **_own(rows, texts),
        "cut_share": [float(not row.finished) for row in rows],
    }
    return {name: by_prompt(rows, column) for name, column in values.items()}


def teacher_values(rows: Sequence[ResponseRow]) -> dict[str, list[float]]:
    """The measures that the references have by themselves, a value per prompt."""
    rows = [row for row in rows if row.sample == 0]
    texts = [row.reference for row in rows]
    within = word_range(texts)
    kept = [checks(r.reference, r.reference_finished, r.prompt, r.reference, within) for r in rows]
    return {
        **_rules(kept),
        **_own(rows, texts),
        "cut_share": [float(not row.reference_finished) for row in rows],
    }


def _rules(kept: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    return {"style": [score(each) for each in kept], "word_range": [each["word_range"] for each in kept]}


def _own(rows: Sequence[ResponseRow], texts: Sequence[str]) -> dict[str, list[float]]:
    """A value per row; texts: of every row."""
    return {
        "words": [float(len(words(text))) for text in texts],
        "distinct_1": _distinct(rows, texts, 1),
        "distinct_2": _distinct(rows, texts, 2),
        "repetition": [repetition(text) for text in texts],
    }


def _distinct(rows: Sequence[ResponseRow], texts: Sequence[str], n: int) -> list[float]:
    each = max(row.sample for row in rows) + 1
    samples = [texts[start : start + each] for start in range(0, len(rows), each)]
    return list(chain.from_iterable(distinct_of_samples(samples, n)))


def measure_set(
    folder: Path, models: Sequence[str], *, resamples: int, fresh: Fresh | None
) -> tuple[dict[str, Results], dict[str, Results], int]:
    """(results by model, the teacher's included; differences to the first model by model; prompts) of a set's folder.

    fresh: the fresh-discriminator test, (rows, file to keep its result in) -> FreshResult as a mapping; None leaves it
      out. Judge scores come from judge/<judge>/<model>.json, where there are any; they have no differences.
    """
    rows = {model: read_responses(folder / f"{model}.jsonl") for model in models}
    _check_same(rows, folder)
    first = {model: [row for row in rows[model] if row.sample == 0] for model in models}
    if fresh is not None and len(first[models[0]]) < 2:
        raise UserError(
            f"{folder} has one prompt, which cannot be cut into halves: give more, or set fresh.enabled to false"
        )
    values = {model: values_of(rows[model]) for model in models}
    results = {TEACHER: _means(teacher_values(rows[models[0]]), resamples)}
    for model in models:
        results[model] = _means(values[model], resamples)
        if fresh is not None:
            found = fresh(first[model], folder / f"fresh-{model}.json")
            results[model]["fresh_accuracy"] = {
                "mean": found["accuracy"],
                **{key: found[key] for key in ("interval", "n", "margin", "train_accuracy", "steps")},
            }
            values[model]["fresh_accuracy"] = list(found["correct"])
        results[model] |= dict(_judge(path) for path in sorted((folder / JUDGED).glob(f"*/{model}.json")))
    differences = {
        model: {
            name: difference(values[models[0]][name], mine, resamples=resamples).as_dict()
            for name, mine in values[model].items()
        }
        for model in models[1:]
    }
    return results, differences, len(first[models[0]])


def _means(values: Mapping[str, Sequence[float]], resamples: int) -> Results:
    found = {name: bootstrap(column, resamples=resamples) for name, column in values.items()}
    # Zeros and ones: where all are alike, as often none or all are cut, the bootstrap would claim to be certain.
    found["cut_share"] = wilson(found["cut_share"].mean, found["cut_share"].n)
    return {name: estimate.as_dict() for name, estimate in found.items()}


def _check_same(rows: Mapping[str, Sequence[ResponseRow]], folder: Path) -> None:
    """Paired differences need the same prompts in the same order."""
    (first, expected), *others = rows.items()
    for model, mine in others:
        if len({max(row.sample for row in each) for each in (mine, expected)}) > 1:
            raise UserError(
                f"{folder / model}.jsonl and {folder / first}.jsonl hold different numbers of responses to a prompt: "
                "draw as many of each (eval.samples)"
            )
        if [row.index for row in mine] != [row.index for row in expected]:
            raise UserError(
                f"{folder / model}.jsonl and {folder / first}.jsonl hold different prompts (index): give both models "
                "the same rows, or compare them in evaluations of their own"
            )


def _judge(path: Path) -> tuple[str, dict[str, Any]]:
    """(measure, its figures) of a file that `judge` wrote."""
    score = read_as(_SCORE, path, "run the judge again")
    return f"{JUDGE_SCORE} {score.judge}", {
        "mean": score.score,
        "interval": score.interval and list(score.interval),
        "n": score.n,
        "unparsable": score.unparsable,
    }


@dataclass(frozen=True)
class _Score:
    """What an evaluation reads of a judge's file."""

    judge: str
    score: Finite | None
    interval: tuple[Finite, Finite] | None
    n: Count
    unparsable: Count


_SCORE = TypeAdapter(_Score)
