"""What a person sees while requests are answered: a bar in a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gadcore.teacher.client import Tally

LINE_EVERY_S = 10.0


@contextmanager
def progress(console: Console, name: str) -> Iterator[Callable[[Tally], None]]:
    """Gives the function that is called at every change (`watch` of ask_all). name: of what is done, a word."""
    if console.is_terminal:
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[figures]}"), console=console) as bar:
            task = bar.add_task(name, total=None, figures="")

            def redraw(tally: Tally) -> None:
                bar.update(task, completed=tally.kept + tally.answered, total=tally.asked_for, figures=_figures(tally))

            yield redraw
        return
    last = float("-inf")

    def line(tally: Tally) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_EVERY_S or not tally.unasked:
            last = time.monotonic()
            done = f"{tally.kept + tally.answered}/{tally.asked_for}"
            console.print(f"{name} {done} {_figures(tally)}", soft_wrap=True)

    yield line


def _figures(tally: Tally) -> str:
    money = "" if tally.cost is None else f", cost {tally.cost:.2f}"
    return f"{tally.spent.tokens} tokens{money}, {len(tally.failed)} failed, {tally.sent} requests sent"
