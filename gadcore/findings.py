"""What the figures of a run say, in sentences: the verdict on the held-out prompts, and warnings from the curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev

from gadcore.measures import number
from gadcore.tracking import Row

PINNED_HIGH, PINNED_LOW = 0.98, 0.53
LENGTH_CORRELATION = 0.5
CUT_RISE, CUT_HIGH = 0.10, 0.30
MISMATCH = 1e-2
FEW_ROWS = 30


@dataclass(frozen=True)
class Warning:
    """A warning: what was seen (title) and what it means and asks for (text)."""

    title: str
    text: str


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
    return " ".join({"gad": "GAD", "seqkd": "SeqKD"}.get(word, word) for word in name.split("_"))


def verdict(evaluations: Mapping[str, Row], rows: Mapping[str, Sequence[Row]]) -> list[str]:
    """Sentences on the held-out prompts, the most important one first.

    evaluations: figures by name, in the order in which they were made (E of summary.json).
    rows: the rows of evaluations/<name>.jsonl; a name may lack them, and its differences are then told without
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
        told = f"The discriminator tells {_percent(last['accuracy'])} of the held-out pairs apart (50 % is guessing)"
        if len(names) > 1 and evaluations[names[-2]].get("accuracy") is not None:
            told += f"; {pretty(names[-2])} it was {_percent(evaluations[names[-2]]['accuracy'])}"
        sentences.append(told + ". It learns along with the student, so a lower share alone proves no better student.")
    if last.get("length_ratio") is not None:
        text = f"Responses are on average {last['length_ratio']:.2f} times as long as the teacher's"
        if last.get("cut_share") is not None:
            text += f", and {_percent(last['cut_share'])} of them are cut at the limit"
            if len(names) > 1 and first.get("cut_share") is not None:
                text += f" ({_percent(first['cut_share'])} before)"
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
    """Warnings from the rows of metrics.jsonl; levels are means over the last fifth of the latest stage."""
    found = [w for w in (_not_finite(rows), _accuracy(rows), _flat_rewards(rows), _length_reward(rows)) if w]
    found += [w for w in (_cut(rows), _mismatch(rows)) if w]
    return found


def _not_finite(rows: Sequence[Row]) -> Warning | None:
    bad = [
        (row["step"], key) for row in rows for key, value in row.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]  # fmt: skip
    if not bad:
        return None
    step, key = bad[0]
    return Warning(
        "Numbers that are not finite",
        f"{key} is NaN or infinite at step {step}" + (f", and {len(bad) - 1} more figures after it" if bad[1:] else "")
        + ". Everything after that step is suspect: lower the learning rate or the clipping norm.",
    )  # fmt: skip


def _accuracy(rows: Sequence[Row]) -> Warning | None:
    level = _tail(rows, "discriminator/accuracy")
    if level is None:
        return None
    if level > PINNED_HIGH:
        return Warning(
            "The discriminator is never fooled",
            f"Its accuracy stays at {_percent(level)}. Rewards then say little about which sample is better. Check "
            "that both sides end in the same end marker, train the student longer in the warmup, or slow the "
            "discriminator down.",
        )
    if level < PINNED_LOW:
        return Warning(
            "The discriminator only guesses",
            f"Its accuracy is {_percent(level)}, near the 50 % of guessing, so rewards are mostly noise. Raise its "
            "learning rate or give it a longer warmup; if the student is truly that close, stop here.",
        )
    return None


def _flat_rewards(rows: Sequence[Row]) -> Warning | None:
    level = _tail(rows, "reward/std")
    if level is None or level > 1e-3:
        return None
    return Warning(
        "Rewards do not differ within a group",
        f"Their standard deviation is {number(level)}: normalised advantages amplify rounding noise. Raise the "
        "sampling temperature or check the discriminator.",
    )


def _length_reward(rows: Sequence[Row]) -> Warning | None:
    level = _tail(rows, "reward/length_corr")
    if level is None or abs(level) < LENGTH_CORRELATION:
        return None
    longer = "longer" if level > 0 else "shorter"
    return Warning(
        "Reward goes with length",
        f"The correlation of reward and length is {level:+.2f}: the student may be learning to write {longer} "
        "responses rather than better ones. Compare the lengths below.",
    )


def _cut(rows: Sequence[Row]) -> Warning | None:
    series = _latest(rows, "length/cut_share")
    if len(series) < 3:
        return None
    size = max(1, len(series) // 5)
    start, end = fmean(series[:size]), fmean(series[-size:])
    if end - start < CUT_RISE and end < CUT_HIGH:
        return None
    moved = f"rose from {_percent(start)} to {_percent(end)}" if end - start >= CUT_RISE else f"is {_percent(end)}"
    return Warning(
        "Many responses are cut",
        f"The share of responses that hit the limit {moved}. The student is not learning to end, or "
        "data.max_response_tokens is too small for this teacher.",
    )


def _mismatch(rows: Sequence[Row]) -> Warning | None:
    level = _tail(rows, "sampler/logprob_diff_mean")
    if level is None or level < MISMATCH:
        return None
    return Warning(
        "Sampler and trainer disagree",
        f"Their log-probabilities differ by {number(level)} a token on average (above {MISMATCH:g}). Look for a "
        "temperature that is applied on one side only, stale weights in the sampler, or a low-precision sampler.",
    )


def _latest(rows: Sequence[Row], key: str) -> list[float]:
    """The finite values of the key in the last stage that has it."""
    stage = next((row["stage"] for row in reversed(rows) if key in row), None)
    return [row[key] for row in rows if row["stage"] == stage and key in row and math.isfinite(row[key])]


def _tail(rows: Sequence[Row], key: str) -> float | None:
    series = _latest(rows, key)
    return fmean(series[-max(3, len(series) // 5) :]) if len(series) >= 3 else None


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 or share > 0.9 else f"{100 * share:.0f} %"
