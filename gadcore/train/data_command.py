"""python -m gadcore.run data FILE [settings]: what a run would read of FILE, before there is a run.

FILE is what data.train may be. Rows go through the student's chat template under the present limits (data.*,
student.model), as they would for training; nothing is written but what many rows are encoded to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.console import Group as Lines
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from gadcore.config import loading
from gadcore.config.command_line import HELP
from gadcore.config.settings import Config
from gadcore.errors import UserError
from gadcore.text import visible
from gadcore.train.early import check_files

if TYPE_CHECKING:
    from gadcore.data.facts import Facts
    from gadcore.train.inputs import Inputs

# Characters of an example's part that are shown, from both of its ends.
_SHOWN = 1200


def main(arguments: Sequence[str], prepare: Callable[[Config], None]) -> int:
    """Runs the command; returns the exit code, 0. Raises UserError for bad settings, and for rows that cannot be used.

    The latter after the others were shown, where there are others.

    prepare: called with the settings before torch is loaded.
    """
    config = loading.load(_with_file(arguments), command="data FILE")
    check_files(config, new=False)
    prepare(config)
    # Imported only now: torch reads the environment when it is loaded.
    from gadcore.data.rows import BadRowsError
    from gadcore.train.inputs import read_inputs
    from gadcore.train.progress import stages_of

    stages = stages_of(config, "train")
    refused = None
    try:
        inputs = read_inputs(config, stages)
    except BadRowsError as error:
        inputs, refused = _without_bad_rows(config, stages, error), error
    _show(config, inputs, refused)
    if refused is not None:
        raise refused
    return 0


def _without_bad_rows(config: Config, stages: Sequence[str], refused: UserError) -> Inputs:
    """What is left without the rows that a run would end at; raises `refused` where that is nothing."""
    from gadcore.train.inputs import read_inputs

    data = config.data.model_copy(update={"bad_rows": "skip"})
    try:
        return read_inputs(config.model_copy(update={"data": data}), stages)
    except UserError:
        raise refused from None


def _show(config: Config, inputs: Inputs, refused: UserError | None) -> None:
    """Prints the page. refused: tells the bad rows after it, so that they are not told in it."""
    from gadcore.data.rows import SKIPPED

    console = wide(Console(markup=False, emoji=False, highlight=False))
    facts = inputs.report.facts
    assert facts is not None
    console.print(Text(f"{config.data.train}: {facts.rows} rows, as {config.student.model} reads them", style="bold"))
    console.print(lengths_table(facts))
    for line in (*_limits(facts), *_counts(facts)):
        console.print(Text(visible(line)), soft_wrap=True)
    for note in inputs.notes:
        if refused is None or SKIPPED not in note:
            console.print(Text(f"note: {visible(note)}"), soft_wrap=True)
    for example in _examples(inputs):
        console.print(example)
    if inputs.warnings:
        console.print(warning_panel(inputs.warnings))


def _with_file(arguments: Sequence[str]) -> list[str]:
    """The settings of a command line, FILE among them as data.train, wherever it stands."""
    settings: list[str] = []
    files: list[str] = []
    items = iter(arguments)
    for item in items:
        if not item.startswith("-"):
            files.append(item)
            continue
        settings.append(item)
        if "=" not in item and item not in HELP:
            settings += islice(items, 1)
    if len(files) > 1:
        raise UserError(f"data takes one FILE, not {' '.join(files)}: put files that belong together in one directory")
    return [*settings, *(f"--data.train={file}" for file in files)]


def wide(console: Console) -> Console:
    """The console, of 120 columns where its output is no terminal."""
    if not console.is_terminal:
        console.width = 120
    return console


def warning_panel(warnings: Sequence[str]) -> Panel:
    """What no run should begin without being read."""
    text = Text("\n".join(visible(warning) for warning in warnings))
    return Panel(text, title=Text("WARNING: look at these rows first"), border_style="bold red", box=box.HEAVY)


def lengths_table(facts: Facts) -> Table:
    """Tokens of prompts and responses, and how many are above their limit."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("tokens")
    for name in ("median", "95 %", "99 %", "longest", "limit", "above it"):
        table.add_column(name, justify="right")
    for name, lengths in (("prompts", facts.prompt), ("responses", facts.response)):
        figures = (lengths.median, lengths.p95, lengths.p99, lengths.longest, lengths.limit)
        above = f"{lengths.over} ({lengths.over / max(1, facts.rows):.1%})"
        table.add_row(name, *(f"{figure}" for figure in figures), above)
    return table


def _limits(facts: Facts) -> Iterator[str]:
    for setting, lengths in (("max_prompt_tokens", facts.prompt), ("max_response_tokens", facts.response)):
        if lengths.over:
            yield (
                f"--data.{setting} {lengths.p95} would fit 95 % of the rows, {lengths.p99} 99 %, {lengths.longest} all"
            )


def _counts(facts: Facts) -> Iterator[str]:
    yield f"turns: {_listed(facts.turns)}; of an assistant's turns the last of a row alone is trained on"
    yield f"responses by script: {_listed(facts.scripts)}"
    repeated = f"{facts.repeated_prompts}, with the same response {facts.repeated_rows}"
    yield f"rows with a prompt that was there before: {repeated}{_rows(facts, 'repeated_prompts')}"
    yield f"responses that begin like a refusal: {facts.refusals}{_rows(facts, 'refusals')}"
    if facts.html:
        yield f"responses with tags or entities of HTML, which the student learns to write: {facts.html}"
    if facts.markers:
        yield f"rows with the marker of a chat template in a text: {_listed(facts.markers)}"


def _rows(facts: Facts, kind: str) -> str:
    count = getattr(facts, kind)
    return f": {facts.named(kind, count)}" if count else ""


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _examples(inputs: Inputs) -> Iterator[Panel]:
    """The first row, one of the middle, and the one with the longest response, as the student is shown them."""
    # Imported only here: the command's --help needs none of it.
    from gadcore.data.encoded import token_lengths

    template = inputs.student.template
    _, lengths = token_lengths(inputs.train)
    for place in dict.fromkeys((0, len(lengths) // 2, int(lengths.argmax()))):
        group = inputs.train[place]
        end = template.end_text if group.teacher.finished else ""
        parts = Lines(
            Text(_shortened(template.rendered(group.prompt.messages)), style="dim"),
            Rule(Text("trained on, from here"), style="green"),
            Text(_shortened(group.teacher.text + end), style="bold green"),
            Rule(Text("to here" if end else "to here: cut by data.max_response_tokens"), style="green"),
        )
        yield Panel(parts, title=Text(f"row {group.prompt.index} (from 0)"), box=box.ROUNDED)


def _shortened(text: str) -> str:
    left_out = len(text) - 2 * _SHOWN
    return visible(f"{text[:_SHOWN]}\n[{left_out} characters]\n{text[-_SHOWN:]}" if left_out > 0 else text)
