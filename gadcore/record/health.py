"""The health of a run, from the latest rows of its metrics: what goes wrong with D, and with what D rewards.

Every warning is a function of a window of rows of metrics.jsonl, and says which setting to look at. The log tells a
warning when it begins, the report which ones hold at the end and which ones were seen before. None changes training.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from gadcore.measure.figures import number
from gadcore.record.tracking import Row

# Levels are means over the latest TAIL of the values in a window, or over a fifth where it holds fewer than 5 TAIL.
WINDOW, TAIL, FEWEST = 100, 20, 3
PINNED_HIGH, PINNED_LOW = 0.98, 0.53
MARGIN_GROWTH = 0.05
MARGIN_SHARE = 0.05
FLAT_STD = 1e-3
LENGTH_CORRELATION = 0.5
LENGTH_BAND = (0.5, 2.0)
FINISHED_CORRELATION = 0.8
CUT_RISE, CUT_HIGH = 0.10, 0.30
REPETITION = 0.25
BY_HEART = 0.15
MISMATCH = 1e-2
# Of the sampler's KL from the trainer: a growth that counts, and what is too little to count.
DRIFT_GROWTH, DRIFT_LEAST = 3.0, 1e-4

# What brings a sampler nearer to the trainer, and what helps where it stays away.
PRECISER = (
    'With vLLM try rollout.dtype or rollout.head_dtype = "float32", and rollout.prefix_caching = false; what stays, '
    "algorithm.importance_cap = 2 takes out of the gradient."
)

Rows = Sequence[Row]


@dataclass(frozen=True)
class Warning:
    """A warning: what was seen (title) and what it means and asks for (text)."""

    title: str
    text: str


@dataclass(frozen=True)
class Episode:
    """A warning from its onset to its last step (both global), None while it lasts."""

    warning: Warning
    first: int
    last: int | None = None


def warnings(window: Rows) -> list[Warning]:
    """What is wrong in the latest rows of one stage, the worst first."""
    return [found for check in CHECKS if (found := check(window)) is not None]


class HealthMonitor:
    """Follows a run row by row. Its state is a function of the rows alone: a resumed run feeds it the old ones.

    episodes: every warning so far. A warning that flickers is one episode: it ends only when it was away for TAIL rows.
    """

    def __init__(self) -> None:
        self.episodes: list[Episode] = []
        self._window: deque[Row] = deque(maxlen=WINDOW)
        self._stage: str | None = None
        # title -> (position in episodes, step it was seen last, rows since)
        self._open: dict[str, tuple[int, int, int]] = {}

    def look(self, row: Row) -> list[Warning]:
        """Takes one row of metrics.jsonl; returns the warnings that begin with it."""
        if row["stage"] != self._stage:
            self._end(list(self._open))
            self._window.clear()
            self._stage = row["stage"]
        self._window.append(row)
        begun = []
        now = {warning.title: warning for warning in warnings(tuple(self._window))}
        for title, warning in now.items():
            if title in self._open:
                at = self._open[title][0]
                self.episodes[at] = replace(self.episodes[at], warning=warning)
            else:
                at = len(self.episodes)
                self.episodes.append(Episode(warning, row["step"]))
                begun.append(warning)
            self._open[title] = at, row["step"], 0
        gone = {title: (at, seen, rows + 1) for title, (at, seen, rows) in self._open.items() if title not in now}
        self._open |= gone
        self._end([title for title, (_, _, rows) in gone.items() if rows >= TAIL])
        return begun

    def current(self) -> list[Warning]:
        """The warnings that hold after the latest row, the worst first."""
        return warnings(tuple(self._window))

    def past(self) -> list[Episode]:
        """The latest episode of every warning that does not hold any more."""
        episodes = list(self.episodes)
        for at, seen, _ in self._open.values():
            episodes[at] = replace(episodes[at], last=seen)
        holding = {warning.title for warning in self.current()}
        latest = {episode.warning.title: episode for episode in episodes}
        return [episode for title, episode in latest.items() if title not in holding]

    def _end(self, titles: Sequence[str]) -> None:
        for title in titles:
            at, seen, _ = self._open.pop(title)
            self.episodes[at] = replace(self.episodes[at], last=seen)


def watched(rows: Rows) -> HealthMonitor:
    """A monitor that has seen these rows of metrics.jsonl."""
    monitor = HealthMonitor()
    for row in rows:
        monitor.look(row)
    return monitor


def _not_finite(rows: Rows) -> Warning | None:
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


def _saturated(rows: Rows) -> Warning | None:
    level, margins = _level(rows, "discriminator/accuracy"), _series(rows, "discriminator/margin")
    if level is None or level <= PINNED_HIGH:
        return None
    growth = ""
    if margins:
        size = _tail(margins)
        if len(margins) < 2 * size:
            return None
        before, now = fmean(margins[-2 * size : -size]), fmean(margins[-size:])
        if now - before <= MARGIN_GROWTH * abs(before):
            return None
        growth = f" and its margin grows, from {number(before)} to {number(now)}"
    return Warning(
        "The discriminator is never fooled",
        f"Its accuracy stays at {percent(level)}{growth}. Rewards then say little about which sample is better. Check "
        "that both sides end in the same end marker, train the student longer (schedule.warmup_steps), or slow the "
        "discriminator down: discriminator.lr, algorithm.discriminator_every, discriminator.label_smoothing or "
        "discriminator.margin_cap.",
    )


def _guessing(rows: Rows) -> Warning | None:
    level, margin = _gad_level(rows, "discriminator/accuracy"), _gad_level(rows, "discriminator/margin")
    std = _gad_level(rows, "reward/std")
    if level is None:
        return None
    near_zero = margin is not None and std is not None and abs(margin) < MARGIN_SHARE * std
    if level >= PINNED_LOW and not near_zero:
        return None
    seen = f"Its accuracy is {percent(level)}, near the 50 % of guessing"
    if level >= PINNED_LOW:
        seen = f"Its margin is {number(margin)}, next to nothing beside the spread of rewards of {number(std)}"
    return Warning(
        "The discriminator only guesses",
        f"{seen}, so rewards are mostly noise. Raise discriminator.lr or algorithm.discriminator_steps, or give it a "
        "longer warmup (schedule.warmup_steps, gate.enabled); if the student is truly that close, stop here.",
    )


def _flat_rewards(rows: Rows) -> Warning | None:
    level = _gad_level(rows, "reward/std")
    if level is None or level > FLAT_STD:
        return None
    return Warning(
        "Rewards do not differ within a group",
        f"Their standard deviation is {number(level)}: normalised advantages amplify rounding noise. Raise "
        "rollout.temperature or algorithm.advantage_std_floor, or check the discriminator.",
    )


def _length_reward(rows: Rows) -> Warning | None:
    level = _gad_level(rows, "reward/length_corr")
    if level is None or abs(level) < LENGTH_CORRELATION:
        return None
    longer = "longer" if level > 0 else "shorter"
    return Warning(
        "Reward goes with length",
        f"The correlation of reward and length is {level:+.2f}: the student may be learning to write {longer} "
        "responses rather than better ones. Compare the lengths, and raise algorithm.kl_coef or lower student.lr where "
        "they drift.",
    )


def _length_ratio(rows: Rows) -> Warning | None:
    level = _gad_level(rows, "length/ratio")
    low, high = LENGTH_BAND
    if level is None or low <= level <= high:
        return None
    kind = "long" if level > high else "short"
    return Warning(
        f"Responses are too {kind}",
        f"They are {level:.2f} times as long as the teacher's, outside {low:g} to {high:g}. Lower student.lr or raise "
        "algorithm.kl_coef, warm the student up for longer (schedule.warmup_steps), and look whether reward goes with "
        "length.",
    )


def _finished_reward(rows: Rows) -> Warning | None:
    level, gap = _gad_level(rows, "reward/finished_corr"), _gad_level(rows, "reward/finished_gap")
    if level is None or gap is None or abs(level) < FINISHED_CORRELATION:
        return None
    better = "finished" if level > 0 else "cut"
    return Warning(
        "The discriminator scores by the end marker",
        f"It scores {better} samples higher by {number(abs(gap))} on average, and whether a sample is finished says "
        f"almost all about its reward (correlation {level:+.2f}). Raise data.max_response_tokens so that fewer samples "
        "are cut, and decide by data.long_response what becomes of the teacher's that are.",
    )


def _cut(rows: Rows) -> Warning | None:
    series = _series(_gad(rows), "length/cut_share")
    if len(series) < FEWEST:
        return None
    size = min(max(1, len(series) // 5), TAIL)
    start, end = fmean(series[:size]), fmean(series[-size:])
    if end - start < CUT_RISE and end < CUT_HIGH:
        return None
    moved = f"rose from {percent(start)} to {percent(end)}" if end - start >= CUT_RISE else f"is {percent(end)}"
    return Warning(
        "Many responses are cut",
        f"The share of responses that hit the limit {moved}. The student is not learning to end, or "
        "data.max_response_tokens is too small for this teacher.",
    )


def _repetition(rows: Rows) -> Warning | None:
    level = _gad_level(rows, "samples/repetition")
    if level is None or level < REPETITION:
        return None
    return Warning(
        "Samples repeat themselves",
        f"{percent(level)} of their runs of four words were there before in the same sample. Lower student.lr or raise "
        "algorithm.kl_coef, and check by the samples that the discriminator does not reward it.",
    )


def _is_ahead(rows: Rows) -> bool:
    """Whether samples are of older weights than those that learn from them, so that their log-probs must differ."""
    return any(row.get("sampler/staleness") for row in rows)


def _mismatch(rows: Rows) -> Warning | None:
    if _is_ahead(rows):
        return None
    level = _level(rows, "sampler/logprob_diff_mean")
    if level is None or level < MISMATCH:
        return None
    return Warning(
        "Sampler and trainer disagree",
        f"Their log-probabilities differ by {number(level)} a token on average (above {MISMATCH:g}). Look for a "
        "temperature that is applied on one side only, stale weights in the sampler, or a low-precision sampler. "
        + PRECISER,
    )


def _drift(rows: Rows) -> Warning | None:
    if _is_ahead(rows):
        return None
    series = _series(rows, "sampler/kl")
    size = _tail(series)
    if len(series) < 2 * size:
        return None
    start, end = fmean(series[:size]), fmean(series[-size:])
    if end < max(DRIFT_LEAST, DRIFT_GROWTH * start):
        return None
    return Warning(
        "Sampler and trainer drift apart",
        f"The sampler's KL from the trainer rose from {number(start)} to {number(end)} a token within {len(series)} "
        "steps: more and more the student learns from the samples of another policy. " + PRECISER,
    )


def _by_heart(rows: Rows) -> Warning | None:
    """By the latest look at held-out prompts (gadcore.train.curriculum)."""
    looks = [row for row in rows if "heldout/accuracy" in row and "heldout/train_accuracy" in row]
    if not looks or looks[-1]["heldout/train_accuracy"] - looks[-1]["heldout/accuracy"] < BY_HEART:
        return None
    trained, held_out = (percent(looks[-1][f"heldout/{name}"]) for name in ("train_accuracy", "accuracy"))
    return Warning(
        "The discriminator learns its texts by heart",
        f"It tells {trained} of the pairs apart that it is trained on, and {held_out} of held-out ones. Give it fewer "
        "steps before GAD (schedule.warmup_steps, curriculum.end_warmup), more smoothing "
        "(discriminator.label_smoothing = 0.1), more prompts a step (schedule.batch_size) or more rows.",
    )


CHECKS: tuple[Callable[[Rows], Warning | None], ...] = (
    _not_finite, _saturated, _guessing, _by_heart, _flat_rewards, _finished_reward, _length_reward, _length_ratio, _cut,
    _repetition, _mismatch, _drift,
)  # fmt: skip


def percent(share: float) -> str:
    """A share as text: 97.5 %, with a decimal place only near the ends."""
    return f"{100 * share:.1f} %" if share < 0.1 or share > 0.9 else f"{100 * share:.0f} %"


def _gad(rows: Rows) -> Rows:
    """Rows in which the student learns from rewards: before, an unfinished D or student is no reason to worry."""
    return [row for row in rows if row["stage"] == "gad"]


def _gad_level(rows: Rows, key: str) -> float | None:
    return _level(_gad(rows), key)


def _level(rows: Rows, key: str) -> float | None:
    """The mean of the latest values, None where there are too few."""
    series = _series(rows, key)
    return fmean(series[-_tail(series) :]) if len(series) >= FEWEST else None


def _tail(series: Sequence[float]) -> int:
    return min(max(FEWEST, len(series) // 5), TAIL)


def _series(rows: Rows, key: str) -> list[float]:
    return [row[key] for row in rows if key in row and math.isfinite(row[key])]
