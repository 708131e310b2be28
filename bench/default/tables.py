"""docs/measured/default-job.md, from bench/results/default.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench import record
from bench.tables import Read, missing, provenance, rows_of, table
from gadcore.measure.figures import MEASURES, Measure, clock
from gadcore.measure.intervals import margin
from gadcore.report.findings import pretty

Row = dict[str, Any]
DOCUMENT = record.DOCUMENTS / "default-job.md"
TITLE = "# The default job, seed by seed"
ABOUT = """Made by `python -m bench tables` from bench/results/default.json, which `python -m bench default` measures:
what `make run` does, with `--run.seed 0, 1, 2`. Measures are of the held-out prompts, several responses each, averaged
by prompt. A change is the mean over prompts of the paired difference, ± half of its 95 % interval; **bold** where the
interval excludes 0 and the change is for the better, *italic* where it is for the worse. A discriminator's figures move
with the discriminator too, words and distinct-2 are to be the teacher's: no change of them is good or bad by itself.

The control: the student that GAD began with, sampled at a higher temperature. What GAD changes and the temperature
changes as well is variety, not quality; a gain of GAD's is one that stands beside the control too."""


def files() -> dict[Path, str]:
    return {DOCUMENT: document()}


def document(read: Read = rows_of) -> str:
    """The whole file."""
    rows = sorted(read("default"), key=lambda row: row["seed"])
    if not rows:
        return "\n\n".join([TITLE, ABOUT, *missing("default")]) + "\n"
    blocks = [TITLE, ABOUT, provenance(rows), _times(rows), *(_over_seeds(rows) if len(rows) > 1 else ())]
    for row in rows:
        blocks += [
            f"## Seed {row['seed']}",
            "\n".join(f"- {sentence}" for sentence in row["sentences"][:3]),
            _measures(row),
        ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _times(rows: Sequence[Row]) -> str:
    phases = [name for name in rows[0]["seconds"] if name != "total"]
    header = ["seed", "threads", "from start to end", *(f"{name.replace('_', ' ')} s" for name in phases)]
    body = []
    for row in rows:
        seconds = [f"{row['seconds'].get(name, 0.0):.0f}" for name in phases]
        body.append([str(row["seed"]), str(row["threads"]), clock(row["seconds"]["total"]), *seconds])
    return table(header, body)


def _over_seeds(rows: Sequence[Row]) -> list[str]:
    """What GAD changed, and GAD beside the control: means over the seeds with intervals over them."""
    columns: dict[str, Callable[[Row], Row]] = {
        "by GAD": lambda row: row["stages"][-1]["changes"],
        "GAD beside the control": lambda row: (row.get("control") or {}).get("changes", {}),
    }
    body = []
    for measure in MEASURES:
        found = [[of(row).get(measure.label) for row in rows] for of in columns.values()]
        if any(None not in changes for changes in found):
            body.append([measure.label, *(_of_seeds(measure, changes) for changes in found)])
    told = (
        f"Means over the {len(rows)} seeds, ± half of the 95 % interval over the seeds (t): what differs from run to "
        "run, where the tables below have what differs from prompt to prompt. Marked as there."
    )
    return ["## Over the seeds", told, table(["measure", *columns], body)]


def _of_seeds(measure: Measure, changes: Sequence[Row | None]) -> str:
    means = [change["mean"] for change in changes if change is not None]
    if len(means) < len(changes):
        return "–"
    mean, around = fmean(means), margin(means) or 0.0
    sign = {"higher": 1, "lower": -1}.get(measure.better, 0) * (mean if abs(mean) > around else 0)
    change = "better" if sign > 0 else "worse" if sign < 0 else None
    return _change(measure, {"mean": mean, "margin": around, "change": change})


def _measures(row: Row) -> str:
    """A line for every measure: its mean after every stage, what every stage changed, and GAD beside the control."""
    # A stage that draws no new responses changes none of them.
    stages = [stage for stage in row["stages"] if any(c["mean"] for c in stage["changes"].values())]
    control = row.get("control")
    header = ["measure", *map(pretty, row["evaluations"])]
    header += [f"by {pretty(stage['after']).removeprefix('after ')}" for stage in stages]
    header += [f"before GAD, at T = {control['temperature']:g}", "GAD beside that"] if control else []
    body = []
    for measure in MEASURES:
        label, means = measure.label, [figures.get(measure.label) for figures in row["evaluations"].values()]
        if any(mean is not None for mean in means):
            line = [label, *map(measure.show, means)]
            line += [_change(measure, stage["changes"].get(label)) for stage in stages]
            if control:
                line += [measure.show(control["means"].get(label)), _change(measure, control["changes"].get(label))]
            body.append(line)
    return table(header, body)


def _change(measure: Measure, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    text = f"{measure.show(found['mean'], signed=True)} ± {measure.show(found['margin']).removesuffix(' %')}"
    return {"better": f"**{text}**", "worse": f"*{text}*"}.get(found["change"], text)
