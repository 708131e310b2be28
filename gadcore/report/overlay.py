"""Two runs on one page: their curves in the same charts, their last evaluations compared prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gadcore.errors import UserError
from gadcore.record.tracking import Row
from gadcore.report import findings, parts
from gadcore.report.charts import Band, Chart, Series
from gadcore.report.curves import Group, groups_of
from gadcore.report.files import RunFiles
from gadcore.report.svg import Point


def overlay_of(one: RunFiles, two: RunFiles) -> dict[str, Any]:
    """Every variable of the report's template except the assets. Raises UserError where both are the same run."""
    if one.folder.resolve() == two.folder.resolve():
        raise UserError(f"{one.folder} and {two.folder} are the same run: give two, or one alone")
    labels = _labels(one, two)
    runs = dict(zip(labels, (one, two), strict=True))
    last = {label: found for label, run in runs.items() if (found := _last(run))}
    figures = {label: figure for label, (_, figure, _) in last.items()}
    rows = {label: answers for label, (_, _, answers) in last.items()}
    warned = [
        replace(w, title=f"{label}: {w.title}") for label, run in runs.items() for w in findings.warnings(run.metrics)
    ]
    bands = _bands(one, two)
    return {
        "run": " beside ".join(labels),
        "finished": all(run.summary is not None for run in runs.values()),
        "state": "two runs",
        "verdict": _verdict(figures, rows, runs),
        "warnings": warned,
        "checked": "" if warned else "No warnings in either run.",
        "facts": _facts(runs),
        "evaluation": parts.table_of(figures, rows, str, _caption(last)),
        "eval_tables": None,
        "doctor_d": None,
        "groups": [
            parts.group_of(group, bands) for group in _merged(labels, [groups_of(r.metrics) for r in runs.values()])
        ],
        "memory": None,
        "machine": [],
        "samples": parts.samples_of(rows, str) if _alike(rows) else [],
        "about_samples": "The same prompts, answered by the student of either run at its end. Scores are of each run's "
        "own discriminator and cannot be compared with each other.",
        "orders": parts.ORDERS,
        "training_samples": [],
        "notes": _notes(rows) + [f"{label}: {note}" for label, run in runs.items() for note in parts.notes_of(run)],
        "phases": [],
        "configs": [(f"config.toml of {label}", run.config_text) for label, run in runs.items()],
        "folder": " and ".join(run.folder.resolve().name for run in runs.values()),
    }


def _facts(runs: Mapping[str, RunFiles]) -> list[parts.Fact]:
    """The facts of both runs, said once where they are the same."""
    each = [(label, fact) for label, run in runs.items() for fact in parts.facts_of(run)]
    each.sort(key=lambda pair: [name for name, _, _ in parts.facts_of(next(iter(runs.values())))].index(pair[1][0]))
    facts = [fact for _, fact in each]
    shown = (fact if facts.count(fact) > 1 else (f"{fact[0]} of {label}", *fact[1:]) for label, fact in each)
    return list(dict.fromkeys(shown))


def _labels(one: RunFiles, two: RunFiles) -> tuple[str, str]:
    """What the runs are called: the first of name, folder and path in which they differ."""
    a, b = one.folder.resolve(), two.folder.resolve()
    pairs = ((one.name, two.name), (a.name, b.name), (str(a), str(b)))
    return next((x, y) for x, y in pairs if x != y)


def _last(run: RunFiles) -> tuple[str, Row, Sequence[Row]] | None:
    """(name, E, rows) of the last evaluation, None where there is none."""
    figures = parts.figures_of(run)
    if not figures:
        return None
    name = list(figures)[-1]
    return name, figures[name], run.evaluations.get(name, [])


def _alike(rows: Mapping[str, Sequence[Row]]) -> bool:
    prompts = [[row["prompt"] for row in answers] for answers in rows.values()]
    return len(prompts) == 2 and prompts[0] == prompts[1] and bool(prompts[0])


def _verdict(figures: Mapping[str, Row], rows: Mapping[str, Sequence[Row]], runs: Mapping[str, RunFiles]) -> list[str]:
    sentences = []
    if len(figures) == 2:
        (one, a), (two, b) = figures.items()
        figure = [f"{e['rouge_l']:.3f} for {name}" for name, e in ((one, a), (two, b)) if e.get("rouge_l") is not None]
        found = findings.between(one, two, rows)
        if found is None or found.margin is None:
            why = "whether by chance cannot be told, since they were not measured on the same prompts"
        else:
            around = f"{two} − {one} is {found.mean:+.3f} ± {found.margin:.3f}".replace("-", "−")
            why = f"{around}, " + (
                "beyond the noise between prompts" if found.clear else "within the noise between prompts"
            )
        sentences.append(f"Held-out ROUGE-L at the end: {', '.join(figure) or 'not measured'}; {why}.")
    for label, run in runs.items():
        sentences.append(f"{label}: {findings.verdict(parts.figures_of(run), run.evaluations)[0]}")
    return sentences


def _caption(last: Mapping[str, tuple[str, Row, Sequence[Row]]]) -> str:
    named = ", ".join(f"{label} {findings.pretty(name)}" for label, (name, _, _) in last.items())
    return f" The last evaluation of each run: {named}." if named else ""


def _notes(rows: Mapping[str, Sequence[Row]]) -> list[str]:
    return (
        []
        if _alike(rows)
        else ["The runs were not evaluated on the same prompts: no change is tested, no responses are shown."]
    )


def _bands(one: RunFiles, two: RunFiles) -> list[Band]:
    """The stages where both runs have the same, else one band without a name over the steps of both."""
    bands = [parts.bands_of(run.metrics) for run in (one, two) if run.metrics]
    if len(bands) == 2 and bands[0] != bands[1]:
        return [Band("", min(b[0].first for b in bands), max(b[-1].last for b in bands))]
    return bands[0] if bands else []


def _merged(labels: Sequence[str], groups: Sequence[Sequence[Group]]) -> list[Group]:
    """The groups of both runs with one chart for what both show; titles are unique within a group."""
    found: dict[str, list[Group | None]] = {}
    for at, its in enumerate(groups):
        for one in its:
            found.setdefault(one.key, [None, None])[at] = one
    merged = []
    for sides in found.values():
        some = next(group for group in sides if group)
        charts: dict[str, list[Chart | None]] = {}
        for at, group in enumerate(sides):
            for chart in group.charts if group else ():
                charts.setdefault(chart.title, [None, None])[at] = chart
        absent = [title for title in some.absent if title not in charts]
        made = [_chart(f"{some.key}-{i}", labels, pair) for i, pair in enumerate(charts.values())]
        merged.append(replace(some, charts=made, absent=absent))
    return merged


def _chart(key: str, labels: Sequence[str], sides: Sequence[Chart | None]) -> Chart:
    """Colours tell the runs apart, or the series where there are several, and dashes the runs then."""
    some = next(chart for chart in sides if chart)
    alone = some.stacked or all(len(chart.series) == 1 for chart in sides if chart)
    series = []
    for run, (label, chart) in enumerate(zip(labels, sides, strict=True)):
        if chart is None:
            continue
        its = [Series("in all", _sums(chart))] if chart.stacked else chart.series
        for i, one in enumerate(its):
            name = label if alone and not chart.stacked else f"{label}: {one.name}"
            series.append(Series(name, one.points, colour=run if alone else i, dash=run))
    return replace(some, key=key, series=series, stacked=False)


def _sums(chart: Chart) -> list[Point]:
    totals: dict[float, float] = {}
    for series in chart.series:
        for step, value in series.points:
            totals[step] = totals.get(step, 0.0) + (value if math.isfinite(value) else 0.0)
    return sorted(totals.items())
