"""What every view of a run shows alike: the plan, lines and tables of evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from gadcore.measure.figures import MEASURES
from gadcore.record.tracking import Row
from gadcore.text import clean

BETTER = {
    "higher": "higher",
    "lower": "lower",
    "near 1": "nearer 1",
    "as the teacher": "as the teacher",
    "discriminator": "–",
}


@dataclass(frozen=True)
class RunPlan:
    """What a run is about to do. stages: (name, steps) in order. step_seconds: predicted, of a step of each stage, for
    their ratios; empty where nothing is predicted.
    """

    run: str
    folder: Path
    student: str
    discriminator: str
    device: str
    stages: tuple[tuple[str, int], ...]
    step_seconds: Mapping[str, float] = field(default_factory=dict)


def evaluation_line(name: str, result: Row) -> str:
    """One line for an evaluation, without the n-gram measures, which summary.json and the report have."""
    shown = [m for m in MEASURES if m.path[0] != "ngram_f1" and m.of(result) is not None]
    figures = " · ".join(f"{m.label} {m.show(m.of(result))}" for m in shown)
    return f"evaluation {name}: {result.get('rows', '?')} rows · {figures}"


def summary_table(summary: Row) -> Table | Text:
    """The evaluations of summary.json side by side, with the change from first to last and when it would be better; a
    sentence where there are none.

    Nothing here says that it is: that takes the values of every prompt, which the report tests against the noise.
    """
    evaluations: dict[str, Row] = summary.get("evaluations") or {}
    if not evaluations:
        return Text("No prompts were held out (data.eval): nothing is known of how much better the student is.")
    names = list(evaluations)
    rows = ", ".join(sorted({str(e.get("rows", "?")) for e in evaluations.values()}))
    table = Table(title=Text(clean(f"Held-out prompts ({rows} rows)")), box=box.SIMPLE_HEAD)
    table.add_column("")
    for name in names:
        table.add_column(Text(clean(name.replace("_", " "))), justify="right")
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
            cells.append(Text(measure.show(difference, signed=True)))
        table.add_row(*cells, Text(BETTER[measure.better], style="dim"))
    return table
