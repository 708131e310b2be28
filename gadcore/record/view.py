"""What a person sees while a run goes on: one live panel in a terminal, plain lines everywhere else.

Prompts and responses come from outside: they are shown as text, never as markup, and control characters (terminal
escapes, bidirectional overrides) are replaced before they reach the screen.
"""

from __future__ import annotations

from typing import Protocol

from rich.console import Console

from gadcore.errors import UserError
from gadcore.record.live import LiveView
from gadcore.record.plain import PlainView
from gadcore.record.text import RunPlan
from gadcore.record.tracking import Row


class View(Protocol):
    """Receives what happens. close() must be called, also when the run fails; it may be called twice."""

    def start(self, plan: RunPlan) -> None: ...

    def stage(self, name: str, steps: int) -> None: ...

    def status(self, text: str) -> None:
        """What is going on from now on, for example "sampling 32 responses"."""

    def phase(self, name: str) -> None:
        """A phase begins; it may be of what status() said, or end that."""

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


class Unseen:
    """Shows nothing: the view of processes that another one speaks for."""

    def start(self, plan: RunPlan) -> None: ...
    def stage(self, name: str, steps: int) -> None: ...
    def status(self, text: str) -> None: ...
    def phase(self, name: str) -> None: ...
    def step(self, row: Row) -> None: ...
    def sample(self, triplet: Row) -> None: ...
    def evaluation(self, name: str, result: Row) -> None: ...
    def summary(self, summary: Row) -> None: ...
    def message(self, text: str) -> None: ...
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
    return LiveView(console)
