"""The live panel of a run in a terminal."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from gadcore.measure.figures import clock, number
from gadcore.record.text import RunPlan, evaluation_line, summary_table
from gadcore.record.tracking import Row
from gadcore.text import clean

BLOCKS = "▁▂▃▄▅▆▇█"
# What the line "now" says in a phase that nobody has said more of.
DOING = {
    "synchronise": "giving the sampler the student's weights",
    "rollout": "waiting for samples",
    "discriminator": "the discriminator computes",
    "discriminator_update": "the discriminator is updated",
    "student": "the student computes",
    "student_update": "the student is updated",
    "reference": "the reference policy computes",
    "rewards": "the rewards are computed",
}
# Phases that a status speaks of, which was said just before them.
SPOKEN_OF = ("setup", "synchronise", "rollout", "evaluation", "checkpoint")


class LiveView:
    """A panel at the bottom of the terminal, redrawn four times a second; messages scroll by above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()  # the panel is drawn by rich's thread
        self._live = Live(console=console, refresh_per_second=4, get_renderable=lambda: self)
        self._rebound: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._plan = RunPlan("", Path(), "", "", "", ())
        self._stage, self._stage_steps = "starting", 0
        self._row: Row = {}
        self._triplet: Row = {}
        self._now_is("starting", said=True)
        self._began = time.monotonic()
        self._history: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=2000))
        # Of steps, by stage; of evaluations.
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=20))
        self._evaluations: list[float] = []
        self._evaluated = False  # after this stage

    def start(self, plan: RunPlan) -> None:
        self._plan, self._began = plan, time.monotonic()
        streams = (sys.stdout, sys.stderr)
        self._live.start()
        self._rebind(streams)

    def stage(self, name: str, steps: int) -> None:
        with self._lock:
            self._stage, self._stage_steps, self._row, self._evaluated = name, steps, {}, False
            self._history.pop("student/loss", None)  # another loss in every stage
            self._now_is(f"beginning with {name}")

    def status(self, text: str) -> None:
        with self._lock:
            self._now_is(text, said=True)

    def phase(self, name: str) -> None:
        with self._lock:
            if not (self._said and name in SPOKEN_OF):
                self._now_is(DOING.get(name, name))

    def _now_is(self, text: str, *, said: bool = False) -> None:
        """said: by status(), which tells more than the name of a phase."""
        self._status, self._since, self._said = text, time.monotonic(), said

    def step(self, row: Row) -> None:
        with self._lock:
            self._row = row
            self._now_is(f"step {row['stage_step']} is done")
            self._stage_steps = row["stage_steps"]  # the gate can make a stage longer
            for key, value in row.items():
                if isinstance(value, int | float):
                    self._history[key].append(value)
            if "time/total" in row:
                self._seconds[row["stage"]].append(row["time/total"])

    def sample(self, triplet: Row) -> None:
        with self._lock:
            self._triplet = triplet

    def evaluation(self, name: str, result: Row) -> None:
        with self._lock:
            self._evaluations.append(time.monotonic() - self._since)
            self._evaluated = True
            self._now_is("the evaluation is done")
        self._console.print(Text(clean(evaluation_line(name, result)), style="bold"))

    def summary(self, summary: Row) -> None:
        self.close()  # so that the table comes last, below the panel
        self._console.print(summary_table(summary))

    def message(self, text: str) -> None:
        self._console.print(Text(clean(text)))

    def close(self) -> None:
        if self._live.is_started:
            with self._lock:
                self._now_is("ended")
            self._live.stop()
            for handler, stream in self._rebound:
                handler.setStream(stream)
            self._rebound.clear()

    def _rebind(self, streams: tuple[Any, Any]) -> None:
        # rich redirects sys.stdout and sys.stderr; a log handler made earlier still holds the terminal itself.
        loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
        handlers = {h for item in loggers if isinstance(item, logging.Logger) for h in item.handlers}
        for handler in handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream in streams:
                self._rebound.append((handler, handler.stream))
                handler.setStream(sys.stdout if handler.stream is streams[0] else sys.stderr)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        with self._lock:
            width = options.max_width - 4
            parts = [self._progress(), self._left(), self._now(), Text(), *self._figures(width)]
            # 24 lines leave room for a few messages above the panel.
            room = max(3, min(16, options.size.height - len(parts) - 10))
            parts += self._sample(console, width, room)
            title = Text(f" gadcore · {clean(self._plan.run)} ", style="bold")
            of = clean(f"student {self._plan.student} · discriminator {self._plan.discriminator}")
            models = Text(f" {of} ", style="dim")
            models.truncate(width, overflow="ellipsis")
            yield Panel(
                Group(*parts), title=title, title_align="left", subtitle=models, subtitle_align="left", box=box.ROUNDED,
                border_style="dim", padding=(0, 1),
            )  # fmt: skip

    def _progress(self) -> RenderableType:
        done = self._row.get("stage_step", 0)
        names = [name for name, _ in self._plan.stages]
        place = f" ({names.index(self._stage) + 1} of {len(names)})" if self._stage in names else ""
        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=max(self._stage_steps, 1), completed=done)
        share = f"{100 * done / self._stage_steps:.0f} %" if self._stage_steps else ""
        grid.add_row(
            Text.assemble((self._stage, "bold cyan"), place, f"  step {done}/{self._stage_steps}"), bar, Text(share)
        )
        return grid

    def _left(self) -> Text:
        """Time left: of this stage, and of the run with the evaluations that follow each of its stages."""
        text = f"elapsed {clock(time.monotonic() - self._began)}"
        if not self._seconds:
            return Text(text + " · time left is known after the first step", style="dim", no_wrap=True)
        each, _ = self._each(self._stage)
        run = stage = each * max(self._stage_steps - self._row.get("stage_step", 0), 0)
        names = [name for name, _ in self._plan.stages]
        later = self._plan.stages[names.index(self._stage) + 1 :] if self._stage in names else ()
        evaluations = len(later) + (not self._evaluated) if self._evaluations else 0
        mark = "about " if later or evaluations else ""
        for name, steps in later:
            seconds, known = self._each(name)
            run += seconds * steps
            if steps and not known:
                mark = "at least "
        if evaluations:
            run += fmean(self._evaluations) * evaluations
        text += f" · left: stage {clock(stage)}, run {mark}{clock(run)} · {number(each)} s a step"
        return Text(text, style="dim", no_wrap=True, overflow="ellipsis")

    def _each(self, stage: str) -> tuple[float, bool]:
        """(seconds of a step of a stage, whether they are known). Until one was timed they are those of the stage timed
        last, by the predicted ratio of both; where that is missing, as if the stages were alike."""
        if stage in self._seconds:
            return fmean(self._seconds[stage]), True
        timed = next(reversed(self._seconds))
        one, other = (self._plan.step_seconds.get(name, 0.0) for name in (timed, stage))
        known = one > 0 and other > 0
        return fmean(self._seconds[timed]) * (other / one if known else 1.0), known

    def _now(self) -> Text:
        waited = time.monotonic() - self._since
        text = Text.assemble(("now  ", "dim"), clean(self._status), (f"  {waited:.0f} s" if waited >= 1 else "", "dim"))
        text.no_wrap, text.overflow = True, "ellipsis"
        return text

    def _figures(self, width: int) -> list[RenderableType]:
        row = self._row

        def show(key: str) -> str:
            return number(row.get(key))

        def share(key: str) -> str:
            return f"{100 * row[key]:.1f} %" if key in row else "–"

        reward = f"{show('reward/mean')} ± {show('reward/std')}" if "reward/mean" in row else "–"
        lengths = f"{show('length/student')} / {show('length/teacher')} teacher" if "length/student" in row else "–"
        drift = f"{show('sampler/logprob_diff_mean')}, max {show('sampler/logprob_diff_max')}"
        loss = "student/ce" if "student/ce" in row else "student/loss"
        lines = [
            ("reward", reward, "reward/mean", "lengths", lengths),
            ("margin", show("discriminator/margin"), "discriminator/margin", "cut", share("length/cut_share")),
            ("D accuracy", share("discriminator/accuracy"), "discriminator/accuracy", "corr(r, len)",
             show("reward/length_corr")),
            ("CE" if loss == "student/ce" else "loss", show(loss), loss, "logp diff",
             drift if "sampler/logprob_diff_mean" in row else "–"),
            ("KL", show("student/kl"), "student/kl", "entropy", show("student/entropy")),
        ]  # fmt: skip
        grid = Table.grid(padding=(0, 1))
        trend = min(60, max(8, width - 63))
        for size in (10, 15, trend, 12, 22):
            grid.add_column(width=size, no_wrap=True, overflow="ellipsis")
        for label, value, key, other, other_value in lines:
            spark = Text(sparkline(self._history.get(key, ()), trend), style="cyan")
            grid.add_row(Text(label, style="dim"), _value(value), spark, Text(other, style="dim"), _value(other_value))
        speed = " · ".join(
            f"{name} {number(row[key])}"
            for name, key in (
                ("sampling", "perf/rollout_tokens_per_s"),
                ("student", "perf/student_tokens_per_s"),
                ("discriminator", "perf/discriminator_tokens_per_s"),
            )
            if key in row
        )
        line = Text.assemble(("tokens/s   ", "dim"), speed or "–")
        line.no_wrap, line.overflow = True, "ellipsis"
        return [grid, line]

    def _sample(self, console: Console, width: int, room: int) -> list[RenderableType]:
        if not self._triplet:
            return []
        triplet = self._triplet
        title = f"sample of step {triplet['step']} · reward {number(triplet.get('reward'))}"
        if triplet.get("teacher_score") is not None:
            title += f", teacher {number(triplet['teacher_score'])}"
        prompt_lines = max(1, room // 5)
        share = max(1, (room - prompt_lines) // 2)
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=8, style="dim")
        grid.add_column()
        for key, lines in (("prompt", prompt_lines), ("teacher", share), ("student", share)):
            grid.add_row(Text(key), _fit(console, str(triplet[key]), width - 9, lines))
        return [Rule(Text(title, style="dim"), style="dim", align="left"), grid]


def sparkline(values: Sequence[float], width: int) -> str:
    """At most `width` blocks, scaled to the range of the values; a value that is not finite shows as ×."""
    numbers = list(values)
    cells = min(width, len(numbers))
    ends = [len(numbers) * i // cells for i in range(cells + 1)] if cells else []
    means = [fmean(numbers[start:end]) for start, end in pairwise(ends)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, span = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)

    def block(mean: float) -> str:
        if not math.isfinite(mean):
            return "×"
        return BLOCKS[round((mean - low) / span * 7) if span else 3]

    return "".join(map(block, means))


def _value(text: str) -> Text:
    return Text(text, style="bold red" if "nan" in text or "inf" in text else "bold")


def _fit(console: Console, text: str, width: int, lines: int) -> Text:
    """The text cut to that many lines, with … where it was cut."""
    wrapped = Text(clean(text[: lines * width + width])).wrap(console, width)
    if len(wrapped) <= lines:
        return Text("\n").join(wrapped)
    last = Text(wrapped[lines - 1].plain.rstrip() + "…")
    last.truncate(width, overflow="ellipsis")
    return Text("\n").join([*wrapped[: lines - 1], last])
