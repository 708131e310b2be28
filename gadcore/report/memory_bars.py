"""Who holds the memory in each state of a step: one horizontal bar per state, and the same in a table.

The states follow each other on one device, so bars stand side by side and are never added up. A colour is an owner
(student, discriminator, ..), a shade what of it; the numbers below a bar are the rows of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from gadcore.record.tracking import Row
from gadcore.report import svg
from gadcore.report.curves import STATES
from gadcore.report.files import RunFiles
from gadcore.report.svg import nice_ticks, percent

OWNERS = {
    "process": "var(--soft)",
    "student": "var(--s0)",
    "reference": "var(--s3)",
    "engine": "var(--s2)",
    "discriminator": "var(--s1)",
}
OTHERS = "var(--s4)"
SHADES = {"parameters": 1.0, "weights": 1.0, "optimizer": 0.55, "kv_cache": 0.4, "gradients": 0.25}
OTHER_SHADE = 0.7
UNKNOWN = "all holders"
# A limit further out than this many times the longest bar would leave the bars too short to read.
LIMIT_WITHIN = 2.0
ROW, BAR, TOP = 74, 24, 26  # pixels
NUMBERED_FROM = 0.035  # of the width
MOST_BYTES = 2.0**60  # a figure beyond is none of a machine's


@dataclass(frozen=True)
class State:
    """Bytes: per holder, and the most that was resident; None where no row has it."""

    name: str
    holders: Mapping[str, int]
    peak: float | None

    @property
    def held(self) -> int:
        return sum(self.holders.values())


def memory_of(run: RunFiles) -> dict[str, Any] | None:
    """The variables of the report's part on memory, None where the run has recorded nothing of it."""
    recorded = (run.summary or {}).get("memory") or {}
    states = _states(recorded.get("states") or {}, run.metrics)
    if not states:
        return None
    limit = recorded.get("limit_bytes")
    longest = max(max(state.held, state.peak or 0) for state in states)
    unit, size = ("GiB", 2**30) if max(longest, limit or 0) >= 2**30 else ("MiB", 2**20)

    def amount(value: float | None) -> str:
        return "–" if value is None else f"{value / size:,.2f}"

    holders = sorted({holder for state in states for holder in state.holders}, key=_order)
    rows = [
        {
            "number": i,
            "swatch": _swatch(holder),
            "label": holder.split("."),
            "values": [amount(state.holders.get(holder)) for state in states],
        }
        for i, holder in enumerate(holders, 1)
    ]
    return {
        "html": _draw(states, holders, limit, unit, size),
        "states": [state.name for state in states],
        "rows": rows,
        "held": [amount(state.held) for state in states],
        "peaks": [amount(state.peak) for state in states] if any(state.peak for state in states) else [],
        "unit": unit,
        "notes": _notes(states, recorded, longest, lambda value: f"{amount(value)} {unit}"),
    }


def _states(recorded: Mapping[str, Mapping[str, int]], rows: Sequence[Row]) -> list[State]:
    names = dict.fromkeys([*STATES, *recorded])
    states = []
    for name in names:
        held, peak = _largest(rows, f"memory/{name}_held"), _largest(rows, f"memory/{name}_peak")
        holders = {holder: size for holder, size in recorded.get(name, {}).items() if size > 0}
        if not holders and held:
            holders = {UNKNOWN: round(held)}
        if holders or peak:
            states.append(State(name, holders, peak))
    return states


def _largest(rows: Sequence[Row], key: str) -> float | None:
    return max((row[key] for row in rows if key in row and 0 <= row[key] <= MOST_BYTES), default=None)


def _order(holder: str) -> tuple[int, int, str]:
    owner, _, what = holder.partition(".")
    owners, kinds = list(OWNERS), list(SHADES)
    return (
        owners.index(owner) if owner in owners else len(owners),
        kinds.index(what) if what in kinds else len(kinds),
        holder,
    )


def _notes(states: Sequence[State], recorded: Row, longest: float, amount: Callable[[float], str]) -> list[str]:
    notes = []
    limit, process = recorded.get("limit_bytes"), recorded.get("process_bytes")
    if limit:
        beyond = " It lies beyond the right edge of the bars." if limit > LIMIT_WITHIN * longest else ""
        notes.append(f"The limit is {amount(limit)}.{beyond}")
    if process and not any("process" in state.holders for state in states):
        notes.append(f"The process itself, its libraries included, takes {amount(process)} more.")
    if any(UNKNOWN in state.holders for state in states):
        notes.append("Who holds what is in summary.json, which has none of it yet.")
    return notes


def _style(holder: str) -> dict[str, object]:
    owner, _, what = holder.partition(".")
    color = OWNERS.get(owner, OTHERS)
    return {"fill": color, "fill_opacity": SHADES.get(what, OTHER_SHADE), "stroke": color}


def _swatch(holder: str) -> Markup:
    square = svg.rect(x=".5", y=".5", width=15, height=11, **_style(holder))
    return svg.element("svg", square, width=16, height=12, aria_hidden="true")


def _draw(states: Sequence[State], holders: Sequence[str], limit: int | None, unit: str, size: int) -> Markup:
    longest = max(max(state.held, state.peak or 0) for state in states)
    shown = limit if limit and limit <= LIMIT_WITHIN * longest else None
    ticks = nice_ticks(0.0, max(longest, shown or 0) / size, 4)
    width = ticks[-1] * size
    bottom = TOP + ROW * len(states) - 8
    parts = []
    for tick in ticks:
        x, anchor = percent(tick / ticks[-1]), "start" if tick == 0 else "end" if tick == ticks[-1] else "middle"
        label = f"{tick:g} {unit}" if tick == ticks[-1] else f"{tick:g}"
        parts.append(svg.vertical(x, TOP, bottom, class_="grid"))
        parts.append(svg.text(label, class_="tick", x=x, y=bottom + 16, text_anchor=anchor))
    for i, state in enumerate(states):
        parts += _bar(state, holders, TOP + ROW * i, width, unit, size)
    if shown:
        x = percent(shown / width)
        parts.append(svg.vertical(x, TOP - 10, bottom, class_="limit"))
        parts.append(svg.text("limit", class_="guide-label", x=x, dx=-5, y=TOP - 4, text_anchor="end"))
    title, description = f"Memory by state in {unit}", _describe(states, unit, size)
    return svg.picture("memory", title, description, svg.join(parts), class_="memory", height=bottom + 24)


def _bar(state: State, holders: Sequence[str], top: int, width: float, unit: str, size: int) -> list[Markup]:
    parts = [svg.text(state.name, class_="state-name", x=0, y=top + 14)]
    y, start = top + 20, 0.0
    for number, holder in enumerate(holders, 1):
        held = state.holders.get(holder, 0)
        if not held:
            continue
        title = svg.element("title", f"{state.name}, {holder}: {held / size:,.2f} {unit}")
        place = {"x": percent(start / width), "width": percent(held / width), "y": y, "height": BAR}
        parts.append(svg.element("rect", title, class_="holder", **place, **_style(holder)))
        if held / width >= NUMBERED_FROM:
            x = percent((start + held / 2) / width)
            parts.append(svg.text(str(number), class_="tick", x=x, y=y + BAR + 14, text_anchor="middle"))
        start += held
    if state.peak:
        title = svg.element("title", f"{state.name}, peak resident: {state.peak / size:,.2f} {unit}")
        parts.append(svg.vertical(percent(state.peak / width), y - 5, y + BAR + 5, title, class_="peak"))
    return parts


def _describe(states: Sequence[State], unit: str, size: int) -> str:
    parts = []
    for state in states:
        holders = ", ".join(f"{name} {held / size:,.2f}" for name, held in state.holders.items())
        peak = f"; peak resident {state.peak / size:,.2f}" if state.peak else ""
        parts.append(f"{state.name}: {state.held / size:,.2f} {unit} held ({holders}){peak}.")
    return " ".join(parts)
