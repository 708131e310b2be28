"""A run as plain lines, for pipes and logs."""

from __future__ import annotations

import io
import json
import time

from rich.console import Console

from gadcore.measure.figures import number
from gadcore.record.text import RunPlan, evaluation_line, summary_table
from gadcore.record.tracking import Row
from gadcore.text import clean, say

# The keys of a plain line, in this order; metrics.jsonl has all of them.
PLAIN_KEYS = (
    "reward/mean", "reward/std", "discriminator/margin", "discriminator/accuracy", "student/loss", "student/ce",
    "preference/loss", "preference/accuracy", "student/kl", "length/student", "length/teacher", "length/cut_share",
    "reward/length_corr", "sampler/logprob_diff_mean", "time/total",
)  # fmt: skip


class PlainView:
    """One line a step, for pipes and logs. The first word of a line says what it is: run, stage, step, sample, ..

    Status lines appear until a stage has made its first step, and later only after 10 silent seconds.
    """

    def __init__(self, console: Console) -> None:
        self._file = console.file
        self._stepped = False
        self._last = 0.0

    def start(self, plan: RunPlan) -> None:
        stages = ", ".join(f"{name} {steps} steps" for name, steps in plan.stages)
        self._print(
            f"run {plan.run}: student {plan.student}, discriminator {plan.discriminator}, device {plan.device}, "
            f"{stages}, folder {plan.folder}"
        )

    def stage(self, name: str, steps: int) -> None:
        self._stepped = False
        self._print(f"stage {name}: {steps} steps")

    def status(self, text: str) -> None:
        if not self._stepped or time.monotonic() - self._last > 10:
            self._print(f"status {text}")

    def phase(self, name: str) -> None:
        """Many a step: none has a line."""

    def step(self, row: Row) -> None:
        self._stepped = True
        figures = " ".join(f"{key}={number(row[key])}" for key in PLAIN_KEYS if key in row)
        self._print(f"step {row['step']} {row['stage']} {row['stage_step']}/{row['stage_steps']} {figures}")

    def sample(self, triplet: Row) -> None:
        texts = " ".join(f"{key}={_quoted(triplet[key])}" for key in ("prompt", "teacher", "student"))
        self._print(
            f"sample step={triplet['step']} reward={number(triplet.get('reward'))} "
            f"teacher_score={number(triplet.get('teacher_score'))} {texts}"
        )

    def evaluation(self, name: str, result: Row) -> None:
        self._print(evaluation_line(name, result))

    def summary(self, summary: Row) -> None:
        text = io.StringIO()
        Console(width=120, color_system=None, file=text).print(summary_table(summary))
        for line in text.getvalue().splitlines():
            self._print(line.rstrip())

    def message(self, text: str) -> None:
        self._print(f"note {clean(text)}")

    def close(self) -> None:
        self._file.flush()

    def _print(self, line: str) -> None:
        say(line, self._file)
        self._last = time.monotonic()


def _quoted(text: str, limit: int = 200) -> str:
    return json.dumps(clean(text if len(text) <= limit else text[:limit] + "…"), ensure_ascii=False)
