"""What the figures of a run say, in sentences: the verdict on the held-out prompts, and warnings from the curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev

from gadcore.measure.figures import number
from gadcore.record.health import Warning, percent, watched
from gadcore.record.tracking import Row

FEW_ROWS = 30


@dataclass(frozen=True)
class Difference:
    """The change of ROUGE-L between two evaluations of the same prompts.

    margin: half the width of the 95 % interval of the mean paired difference, over prompts; None below two prompts.
    """

    mean: float
    margin: float | None
    up: int
    down: int

    @property
    def clear(self) -> bool:
        return self.margin is not None and abs(self.mean) > self.margin


def difference(before: Sequence[Row], after: Sequence[Row]) -> Difference:
    """The paired difference in ROUGE-L; both are rows of evaluations/*.jsonl in the same order, at least one."""
    changes = [b["rouge_l"] - a["rouge_l"] for a, b in zip(before, after, strict=True)]
    margin = 1.96 * stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None
    return Difference(fmean(changes), margin, sum(c > 0 for c in changes), sum(c < 0 for c in changes))


def pretty(name: str) -> str:
    """The name of an evaluation or stage as people write it."""
    return " ".join({"gad": "GAD", "seqkd": "SeqKD", "sft": "SFT"}.get(word, word) for word in name.split("_"))


def verdict(evaluations: Mapping[str, Row], rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Sentences on the held-out prompts, the most important one first.

    evaluations: figures by name, in the order in which they were made (E of summary.json).
    rows: the rows of evaluations/<name>.jsonl; a name may lack them, and its differences are then given without
    their margin of error.
    """
    names = list(evaluations)
    if not names:
        return [
            "There is no evaluation on held-out prompts, so nothing can be said about whether the student improved."
        ]
    first, last = evaluations[names[0]], evaluations[names[-1]]
    count = last.get("rows", len(rows.get(names[-1], ())))
    sentences = [_main(names, evaluations, rows, count)]
    if len(names) > 2:
        steps = [_step(a, b, evaluations, rows) for a, b in pairwise(names)]
        sentences.append("Stage by stage: " + "; ".join(steps) + ".")
    if last.get("accuracy") is not None:
        sentence = f"The discriminator tells {percent(last['accuracy'])} of the held-out pairs apart (50 % is guessing)"
        if len(names) > 1 and evaluations[names[-2]].get("accuracy") is not None:
            sentence += f"; {pretty(names[-2])} it was {percent(evaluations[names[-2]]['accuracy'])}"
        sentence += ". It learns along with the student, so a lower share alone proves no better student."
        sentences.append(sentence)
    if last.get("length_ratio") is not None:
        text = f"Responses are on average {last['length_ratio']:.2f} times as long as the teacher's"
        if last.get("cut_share") is not None:
            text += f", and {percent(last['cut_share'])} of them are cut at the limit"
            if len(names) > 1 and first.get("cut_share") is not None:
                text += f" ({percent(first['cut_share'])} before)"
        sentences.append(text + ".")
    if 0 < count < FEW_ROWS:
        sentences.append(f"With only {count} held-out prompts, small differences mean little.")
    return sentences


def _main(names: list[str], evaluations: Mapping[str, Row], rows: Mapping[str, Sequence[Row]], count: int) -> str:
    a, b = evaluations[names[0]].get("rouge_l"), evaluations[names[-1]].get("rouge_l")
    if a is None or b is None:
        return f"The evaluation of {count} held-out prompts has no ROUGE-L."
    if len(names) == 1:
        return f"Only one evaluation exists ({pretty(names[0])}): held-out ROUGE-L is {a:.3f} on {count} prompts."
    found = between(names[0], names[-1], rows)
    if found is None:
        word = "rose" if b > a else "fell" if b < a else "stayed"
        return f"Held-out ROUGE-L {word} from {a:.3f} to {b:.3f} on {count} prompts; whether by chance is not known."
    counts = f"{found.up} of {count} prompts up, {found.down} down"
    if found.margin is None:
        return f"Held-out ROUGE-L went from {a:.3f} to {b:.3f}, on one prompt, which shows nothing."
    interval = f"{_signed(found.mean)} ± {found.margin:.3f}, {counts}"
    if not found.clear:
        return f"Held-out ROUGE-L did not change measurably: {a:.3f} before, {b:.3f} now ({interval})."
    return f"Held-out ROUGE-L {'rose' if found.mean > 0 else 'fell'} from {a:.3f} to {b:.3f} ({interval})."


def _step(a: str, b: str, evaluations: Mapping[str, Row], rows: Mapping[str, Sequence[Row]]) -> str:
    found = between(a, b, rows)
    if found is None:
        one, two = evaluations[a].get("rouge_l"), evaluations[b].get("rouge_l")
        return f"{pretty(b).removeprefix('after ')} from {number(one)} to {number(two)}"
    margin = f" ± {found.margin:.3f}" if found.margin is not None else ""
    note = "" if found.clear else ", within the noise"
    return f"{pretty(b).removeprefix('after ')} {_signed(found.mean)}{margin}{note}"


def between(a: str, b: str, rows: Mapping[str, Sequence[Row]]) -> Difference | None:
    """The difference between the evaluations a and b; None where their rows are missing or not the same ones."""
    before, after = rows.get(a), rows.get(b)
    return difference(before, after) if before and after and len(before) == len(after) else None


def warnings(rows: Sequence[Row]) -> list[Warning]:
    """Warnings from the rows of metrics.jsonl: those that hold at the end, then those that were seen before."""
    monitor = watched(rows)
    earlier = [
        Warning(f"{e.warning.title}, from step {e.first} to {e.last}", f"{e.warning.text} It does not hold any more.")
        for e in monitor.past()
    ]
    return monitor.current() + earlier


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
