"""What the figures of a run say, in sentences: the verdict on the held-out prompts, and warnings from the curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import fmean

from gadcore.measure.figures import MEASURES, Measure, number
from gadcore.measure.intervals import margin
from gadcore.measure.likeness import NGRAMS, ngram_f1
from gadcore.measure.power import least_seen, rows_needed
from gadcore.measure.rewarded import HELD, LENGTH, Association, associations
from gadcore.record.health import Warning, percent, watched
from gadcore.record.tracking import Row

FEW_ROWS = 30
MINUS = str.maketrans("-", "−")
ROUGE_L = next(measure for measure in MEASURES if measure.path == ("rouge_l",))


def _ngram_f1(n: int, row: Row) -> float:
    return ngram_f1(row["student"], row["teacher"], n)


# What the rows of older runs, which drew one sample a prompt, say of measures that they do not hold.
ONE_SAMPLE: dict[tuple[str, ...], Callable[[Row], float | None]] = {
    **{("ngram_f1", str(n)): partial(_ngram_f1, n) for n in NGRAMS},
    ("accuracy",): lambda row: None if (s := _scores(row)) is None else float(s[0] > s[1]),
    ("margin",): lambda row: None if (s := _scores(row)) is None else s[0] - s[1],
}
# What the first sentences look at: they name those that changed beyond the noise, the one that shows it best first.
HEADLINES = (("rouge_l",), ("style",), ("word_range",), ("repeated",), ("distinct_2",), ("cut_share",))
# So many of them beside ROUGE-L are named in a sentence; the table has all.
_NAMED = 3


@dataclass(frozen=True)
class Difference:
    """The change of a measure between two evaluations of the same prompts.

    margin: half the width of the 95 % interval of the mean paired difference, over prompts; None below two prompts.
    change: "better" or "worse" where the interval shows it, "noise" where it does not, None for a measure of which no
    change is better or worse. up, down: prompts. together: the margin where all of HEADLINES are to hold at once.
    needed: prompts that would show a difference of this size in four of five tries; least: the least that these show.
    """

    mean: float
    margin: float | None
    up: int
    down: int
    change: str | None
    together: float | None = None
    needed: int | None = None
    least: float | None = None

    @property
    def clear(self) -> bool:
        return _clear(self.mean, self.margin)

    @property
    def leads(self) -> bool:
        """Whether it is clear although so many measures were looked at."""
        return _clear(self.mean, self.together)

    @property
    def sensitivity(self) -> float:
        """The difference over its margin: how well the measure shows it."""
        return abs(self.mean) / self.margin if self.margin else math.inf


def values_of(measure: Measure, rows: Sequence[Row]) -> list[float] | None:
    """The measure of every row of an evaluation; None where a row lacks it or it is not finite."""
    read = ONE_SAMPLE.get(measure.path, lambda row: None)
    values = [read(row) if (held := measure.of(row)) is None else held for row in rows]
    known = [value for value in values if value is not None and math.isfinite(value)]
    return known if known and len(known) == len(rows) else None


def difference(measure: Measure, before: Sequence[Row], after: Sequence[Row]) -> Difference | None:
    """The paired difference; None where the rows are not of the same prompts, or lack the measure."""
    if len(before) != len(after) or any(a["prompt"] != b["prompt"] for a, b in zip(before, after, strict=True)):
        return None
    first, second = values_of(measure, before), values_of(measure, after)
    if first is None or second is None:
        return None
    changes = [b - a for a, b in zip(first, second, strict=True)]
    gains = _gains(measure, first, second)
    better: str | None = None
    if gains is not None:
        gained, lost = fmean(gains), margin(gains)
        better = "noise" if not _clear(gained, lost) else "better" if gained > 0 else "worse"
    up, down = sum(change > 0 for change in changes), sum(change < 0 for change in changes)
    return Difference(
        fmean(changes),
        margin(changes),
        up,
        down,
        better,
        margin(changes, len(HEADLINES)),
        rows_needed(changes),
        least_seen(changes),
    )


def _gains(measure: Measure, first: Sequence[float], second: Sequence[float]) -> list[float] | None:
    """How much better every row has become; None for a measure of which no change is better or worse."""
    if measure.better in ("discriminator", "as the teacher"):
        return None
    # Of a mean that should be near 1: how much nearer it has come is the mean of these.
    if measure.better == "near 1":
        one, two = (math.copysign(1.0, fmean(values) - 1) for values in (first, second))
        return [one * (a - 1) - two * (b - 1) for a, b in zip(first, second, strict=True)]
    sign = -1.0 if measure.better == "lower" else 1.0
    return [sign * (b - a) for a, b in zip(first, second, strict=True)]


def _clear(mean: float, around: float | None) -> bool:
    # What rounding leaves of equal values is no change.
    return around is not None and abs(mean) > max(around, 1e-12)


def _scores(row: Row) -> tuple[float, float] | None:
    """(teacher's, student's) of D."""
    return None if row.get("student_score") is None else (row["teacher_score"], row["student_score"])


def pretty(name: str) -> str:
    """The name of an evaluation or stage as people write it."""
    return " ".join(
        {"gad": "GAD", "seqkd": "SeqKD", "sft": "SFT", "soda": "SODA"}.get(word, word) for word in name.split("_")
    )


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
    of_gad, why = _of_gad(names, rows)
    sentences = [*of_gad, _main(names, evaluations, rows, count), *why, *_power(names, rows)]
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


def _of_gad(names: Sequence[str], rows: Mapping[str, Sequence[Row]]) -> tuple[list[str], list[str]]:
    """(what the GAD stage made better, or that it made nothing better, why): where it is the last of several stages."""
    if len(names) < 3 or names[-1] != "after_gad":
        return [], []
    stage = names[-2:]
    headlines = [measure for measure in MEASURES if measure.path in HEADLINES]
    found = [between(stage[0], stage[1], rows, measure) for measure in headlines]
    if not any(each and each.margin is not None for each in found):
        return [], []
    led = _led(stage, rows, headlines)
    better, worse, moved = ([each for each in led if each[1].change == change] for change in ("better", "worse", None))
    where = f"on {len(rows[stage[1]])} held-out prompts"
    told = [f"{where} {'; '.join(_others(better[:_NAMED], stage, rows))}"] if better else []
    told += [f"worse {where}: {'; '.join(_others(worse[:_NAMED], stage, rows))}"] if worse else []
    if better:
        sentence = f"GAD made the student better: {'. But '.join(told)}."
    else:
        nothing = f"GAD made nothing better that {len(rows[stage[1]])} held-out prompts can show"
        sentence = f"{nothing}; {told[0]}." if told else f"{nothing}, and nothing worse."
    if moved:
        sentence += f" It moved what a higher temperature moves as well: {'; '.join(_others(moved, stage, rows))}."
    return [sentence], _climbed(associations(rows[stage[0]]), why=not better)


def _climbed(found: Mapping[str, Association], why: bool) -> list[str]:
    """What the score went with among a prompt's samples when GAD began, and so what GAD could learn from it."""
    if not found:
        return []
    told = []
    if (length := found.get(LENGTH)) is not None:
        which = {1: "longer ones higher", -1: "shorter ones higher", 0: "longer and shorter ones alike"}[length.sign]
        told.append(f"{which} (correlation {_correlation(length)})")
    beside = [
        f"{_WORDS[each.sign]} those {_THOSE[name]} ({_correlation(each)})"
        for name in HELD
        if (each := found.get(name)) is not None
    ]
    told += [f"of equally long ones {', '.join(beside)}"] if beside else []
    sentence = (
        f"GAD climbs the discriminator's score. As GAD began, it scored of a prompt's responses {'; '.join(told)}."
    )
    return [f"Why GAD made nothing better: {sentence}" if why else sentence]


_WORDS = {1: "higher", -1: "lower", 0: "no higher"}
_THOSE = {"style": "that keep more rules of style", "rouge_l": "nearer to the teacher's by ROUGE-L"}


def _correlation(found: Association) -> str:
    return f"{found.correlation:+.2f} [{found.low:+.2f}, {found.high:+.2f}]".translate(MINUS)


def _main(names: list[str], evaluations: Mapping[str, Row], rows: Mapping[str, Sequence[Row]], count: int) -> str:
    a, b = evaluations[names[0]].get("rouge_l"), evaluations[names[-1]].get("rouge_l")
    if a is None or b is None:
        return f"The evaluation of {count} held-out prompts has no ROUGE-L."
    if len(names) == 1:
        return f"Only one evaluation exists ({pretty(names[0])}): held-out ROUGE-L is {a:.3f} on {count} prompts."
    led = _led(names, rows, [m for m in MEASURES if m.path in HEADLINES and m is not ROUGE_L])[:_NAMED]
    found = between(names[0], names[-1], rows)
    if found is None:
        word = "rose" if b > a else "fell" if b < a else "stayed"
        return f"Held-out ROUGE-L {word} from {a:.3f} to {b:.3f} on {count} prompts; whether by chance is not known."
    counts = f"{found.up} of {count} prompts up, {found.down} down"
    if found.margin is None:
        return f"Held-out ROUGE-L went from {a:.3f} to {b:.3f}, on one prompt, which shows nothing."
    interval = f"{_signed(found.mean)} ± {found.margin:.3f}, {counts}"
    if not found.clear:
        rouge_l = f"ROUGE-L did not change measurably: {a:.3f} before, {b:.3f} now ({interval})"
        return f"Held-out {'; '.join([*_others(led, names, rows), rouge_l])}."
    stage = _by_stage(names, ROUGE_L, found, rows)
    rouge_l = f"ROUGE-L {'rose' if found.mean > 0 else 'fell'} from {a:.3f} to {b:.3f} ({interval}{stage})"
    # Where it is clear by itself alone it still stands here, behind what is clear beside all others.
    before = [each for each in led if not found.leads or each[1].sensitivity > found.sensitivity]
    behind = [each for each in led if each not in before]
    return f"Held-out {'; '.join([*_others(before, names, rows), rouge_l, *_others(behind, names, rows)])}."


def _led(
    names: Sequence[str], rows: Mapping[str, Sequence[Row]], measures: Sequence[Measure]
) -> list[tuple[Measure, Difference]]:
    """Of the measures those that changed beyond the noise of all headlines, the most sensitive first."""
    found = [(measure, change) for measure in measures if (change := between(names[0], names[-1], rows, measure))]
    return sorted((each for each in found if each[1].leads), key=lambda each: -each[1].sensitivity)


def _power(names: Sequence[str], rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Where ROUGE-L shows nothing: what these prompts could have shown, and how many a change of this size needs."""
    found = between(names[0], names[-1], rows) if len(names) > 1 else None
    if found is None or found.clear or not found.least:
        return []
    told = f"These prompts show a difference in ROUGE-L of {found.least:.3f} or more in four of five tries"
    if found.needed is not None:
        told += f"; one of the size found would take about {found.needed:,} prompts"
    looked = [measure for measure in MEASURES if measure.path in HEADLINES and measure is not ROUGE_L]
    others = {measure.phrase: between(names[0], names[-1], rows, measure) for measure in looked}
    needed = {phrase: other.needed for phrase, other in others.items() if other and other.needed and not other.clear}
    best = min(needed, key=lambda phrase: needed[phrase], default=None)
    if best is not None and (found.needed is None or needed[best] < found.needed):
        told += f"; the change that takes the fewest is that of {best}, about {needed[best]:,}"
    return [f"{told}."]


def _others(
    led: Sequence[tuple[Measure, Difference]], names: Sequence[str], rows: Mapping[str, Sequence[Row]]
) -> list[str]:
    """Of measures that changed: from, to, by how much, by which stage."""
    told = []
    for measure, found in led:
        if found.margin is None:
            continue
        one, two = (measure.show(fmean(values_of(measure, rows[name]) or [math.nan])) for name in (names[0], names[-1]))
        size, unit = measure.show(found.mean, signed=True), " pp" if measure.share else ""
        around = f"{100 * found.margin:.1f}" if measure.share else f"{found.margin:.3f}"
        change = f"{size.removesuffix(unit)} ± {around}{unit}".translate(MINUS)
        word = "rose" if found.mean > 0 else "fell"
        told.append(f"{measure.phrase} {word} from {one} to {two} ({change}{_by_stage(names, measure, found, rows)})")
    return told


def _by_stage(names: Sequence[str], measure: Measure, whole: Difference, rows: Mapping[str, Sequence[Row]]) -> str:
    """The stages whose own change in the same direction is beyond the noise; "" where there is one stage, or none."""
    if len(names) < 3:
        return ""
    steps = [(b, between(a, b, rows, measure)) for a, b in pairwise(names)]
    clear = [name for name, found in steps if found and found.clear and (found.mean > 0) == (whole.mean > 0)]
    return f", by {' and '.join(pretty(name).removeprefix('after ') for name in clear)}" if clear else ""


def same_responses(a: str, b: str, rows: Mapping[str, Sequence[Row]]) -> bool:
    """Whether two evaluations are of the very same responses: what lay between them trained the discriminator alone."""
    one, two = ([_texts(row) for row in rows.get(name, ())] for name in (a, b))
    return bool(one) and one == two


def _texts(row: Row) -> list[str]:
    return [sample["text"] for sample in row.get("samples") or ()] or [row["student"]]


def _step(a: str, b: str, evaluations: Mapping[str, Row], rows: Mapping[str, Sequence[Row]]) -> str:
    if same_responses(a, b, rows):
        return f"{pretty(b).removeprefix('after ')} left the student as it was"
    found = between(a, b, rows)
    if found is None:
        one, two = evaluations[a].get("rouge_l"), evaluations[b].get("rouge_l")
        return f"{pretty(b).removeprefix('after ')} from {number(one)} to {number(two)}"
    around = f" ± {found.margin:.3f}" if found.margin is not None else ""
    note = "" if found.clear else ", within the noise"
    return f"{pretty(b).removeprefix('after ')} {_signed(found.mean)}{around}{note}"


def between(a: str, b: str, rows: Mapping[str, Sequence[Row]], measure: Measure = ROUGE_L) -> Difference | None:
    """The difference between the evaluations a and b; None where their rows are missing or not the same ones."""
    before, after = rows.get(a), rows.get(b)
    return difference(measure, before, after) if before and after else None


def warnings(rows: Sequence[Row]) -> list[Warning]:
    """Warnings from the rows of metrics.jsonl: those that hold at the end, then those that were seen before."""
    monitor = watched(rows)
    earlier = [
        Warning(f"{e.warning.title}, from step {e.first} to {e.last}", f"{e.warning.text} It does not hold any more.")
        for e in monitor.past()
    ]
    return monitor.current() + earlier


def _signed(value: float) -> str:
    return f"{value:+.3f}".translate(MINUS)
