"""What a person sees while a run goes on: one live panel in a terminal, plain lines everywhere else.

Prompts and responses come from outside: they are shown as text, never as markup, and control characters (terminal
escapes, bidirectional overrides) are replaced before they reach the screen.
"""

from __future__ import annotations

import io
import json
import time
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gadcore.errors import UserError
from gadcore.measures import MEASURES, number
from gadcore.tracking import Row

# The keys of a plain line, in this order; metrics.jsonl has all of them.
PLAIN_KEYS = (
    "reward/mean", "reward/std", "discriminator/margin", "discriminator/accuracy", "student/loss", "student/ce",
    "student/kl", "length/student", "length/teacher", "length/cut_share", "reward/length_corr",
    "sampler/logprob_diff_mean", "time/total",
)  # fmt: skip
BETTER = {"higher": "higher", "lower": "lower", "near 1": "nearer 1", "judge": "–"}


@dataclass(frozen=True)
class Plan:
    """What a run is about to do. stages: (name, steps) in order."""

    run: str
    folder: Path
    student: str
    discriminator: str
    device: str
    stages: tuple[tuple[str, int], ...]


class View(Protocol):
    """Receives what happens. close() must be called, also when the run fails; it may be called twice."""

    def start(self, plan: Plan) -> None: ...

    def stage(self, name: str, steps: int) -> None: ...

    def status(self, text: str) -> None:
        """What is going on from now on, for example "sampling 32 responses"."""

    def step(self, row: Row) -> None:
        """One row of metrics.jsonl."""

    def sample(self, triplet: Row) -> None:
        """One row of samples.jsonl."""

    def evaluation(self, name: str, result: Row) -> None:
        """One evaluation of summary.json."""

    def summary(self, summary: Row) -> None:
        """The table of summary.json, at the end."""

    def message(self, text: str) -> None:
        """A sentence that stays on the screen."""

    def close(self) -> None: ...


def make_view(kind: str, console: Console | None = None) -> View:
    """ "live", "plain", or "auto": live where standard output is a terminal that shows UTF-8, plain elsewhere.

    Raises UserError where "live" was asked for and the output is no terminal.
    """
    # Without markup=False rich would read "[/x]" in the output of other libraries as its own markup, and fail.
    console = console or Console(markup=False, emoji=False, highlight=False)
    fit = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
    if kind == "live" and not fit:
        raise UserError('tracking.view = "live" needs a terminal that shows UTF-8: use "auto" or "plain"')
    if kind not in ("auto", "live", "plain"):
        raise UserError(f'tracking.view = "{kind}" is unknown: use "auto", "live" or "plain"')
    if kind == "plain" or not fit:
        return PlainView(console)
    from gadcore.live import LiveView

    return LiveView(console)


class PlainView:
    """One line a step, for pipes and logs. The first word of a line says what it is: run, stage, step, sample, ..

    Status lines appear until a stage has made its first step, and later only after 10 silent seconds.
    """

    def __init__(self, console: Console) -> None:
        self._file = console.file
        self._stepped = False
        self._last = 0.0

    def start(self, plan: Plan) -> None:
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
        # A pipe may speak ASCII only; a character that it cannot take must not end a run.
        encoding = getattr(self._file, "encoding", None) or "utf-8"
        self._file.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        self._file.flush()
        self._last = time.monotonic()


def evaluation_line(name: str, result: Row) -> str:
    """One line for an evaluation, without the n-gram measures, which summary.json and the report have."""
    shown = [m for m in MEASURES if m.path[0] != "ngram_f1" and m.of(result) is not None]
    figures = " · ".join(f"{m.label} {m.show(m.of(result))}" for m in shown)
    return f"evaluation {name}: {result.get('rows', '?')} rows · {figures}"


def summary_table(summary: Row) -> Table:
    """The evaluations of summary.json side by side, with the change from first to last and when it is better."""
    evaluations: dict[str, Row] = summary.get("evaluations") or {}
    names = list(evaluations)
    rows = ", ".join(sorted({str(e.get("rows", "?")) for e in evaluations.values()}))
    table = Table(title=Text(f"Held-out prompts ({rows or 'no'} rows)"), box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in names:
        table.add_column(Text(name.replace("_", " ")), justify="right")
    if len(names) > 1:
        table.add_column("change", justify="right")
    table.add_column("better when")
    for measure in MEASURES:
        values = [measure.of(evaluations[name]) for name in names]
        if all(value is None for value in values):
            continue
        cells = [Text(measure.label), *(Text(measure.show(value)) for value in values)]
        if len(values) > 1:
            first, last = values[0], values[-1]
            difference = None if first is None or last is None else last - first
            style = {"better": "green", "worse": "red"}.get(measure.change(first, last) or "", "")
            cells.append(Text(measure.show(difference, signed=True), style=style))
        table.add_row(*cells, Text(BETTER[measure.better], style="dim"))
    return table


def clean(text: str) -> str:
    """One line without anything that a terminal would obey: white space is joined, control characters become ·."""
    joined = " ".join(text.split())
    return "".join("·" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\u200d" else c for c in joined)


def _quoted(text: str, limit: int = 200) -> str:
    return json.dumps(clean(text if len(text) <= limit else text[:limit] + "…"), ensure_ascii=False)
