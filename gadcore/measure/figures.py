"""The figures that people are shown: which ones an evaluation has, when they are better, and how they are written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Measure:
    """One figure of an evaluation: its path in summary.json, its name for people, and when it is better.

    better: "higher", "lower", "near 1", "as the teacher" (whose own figure the evaluation holds), or "discriminator": a
    figure of the discriminator's, which moves with the discriminator as much as with the student, so that no change
    of it is better or worse by itself.
    """

    path: tuple[str, ...]
    label: str
    better: str
    share: bool = False
    sentence: str = ""

    @property
    def phrase(self) -> str:
        """What the measure is called inside a sentence."""
        return self.sentence or self.label

    def of(self, evaluation: dict[str, Any]) -> float | None:
        """The value, None where the evaluation has none."""
        value: Any = evaluation
        for key in self.path:
            value = value.get(key) if isinstance(value, dict) else None
        return None if value is None else float(value)

    def show(self, value: float | None, signed: bool = False) -> str:
        """The value as text, – for None; signed: a difference, which for a share is in percentage points (pp)."""
        if value is None:
            return "–"
        if signed:
            # Adding 0.0 turns a rounded -0.0 into 0.0.
            return f"{round(100 * value, 1) + 0.0:+.1f} pp" if self.share else f"{round(value, 3) + 0.0:+.3f}"
        return f"{100 * value:.1f} %" if self.share else f"{value:.3f}"


MEASURES = (
    Measure(("rouge_l",), "ROUGE-L", "higher"),
    *(Measure(("ngram_f1", str(n)), f"{n}-gram F1", "higher") for n in range(1, 5)),
    Measure(("style",), "house style", "higher", True, "the share of the rules of style that responses keep"),
    Measure(
        ("word_range",), "length as the teacher's", "higher", True, "the share of responses as long as the teacher's"
    ),
    Measure(("length_ratio",), "length ratio", "near 1"),
    Measure(("words",), "words", "as the teacher"),
    Measure(("repeated",), "say a 3-gram twice", "lower", True, "the share of responses that say a 3-gram twice"),
    # A higher temperature raises it as well: by itself it makes no student better.
    Measure(("distinct_2",), "distinct-2", "as the teacher"),
    Measure(("cut_share",), "responses cut", "lower", True, "the share of responses that were cut"),
    Measure(("accuracy",), "D tells apart", "discriminator", share=True),
    Measure(("margin",), "D margin", "discriminator"),
)


def number(value: float | None) -> str:
    """Three or so significant digits; – for None."""
    if value is None:
        return "–"
    size = abs(value)
    if not math.isfinite(value) or value == 0:
        return f"{value:.0f}"
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.3f}" if size >= 0.01 else f"{value:.1e}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
