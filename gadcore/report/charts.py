"""Line charts and stacked charts as inline SVG: no script needed to read them, a few lines of it to read values off.

The drawing area has no viewBox, so text keeps its size at every width: text and grid are placed in percent, and the
curves lie in an inner SVG that is stretched, with strokes that do not scale. Space for the labels comes from the
padding of .plot in report.css. Colours are the CSS variables --s0 .. --s4 (told apart under the common forms
of colour blindness); dashes tell the series apart where there is no colour.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from markupsafe import Markup

from gadcore.measure.figures import number
from gadcore.report import svg
from gadcore.report.svg import Point, Scale, nice_ticks, percent

SIZE = 1000.0  # of the inner, stretched drawing
MAX_POINTS = 1000
SMOOTH_FROM = 200
DASHES = ("", "7 4", "1.5 4", "10 3 2 3", "4 2")
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Band:
    """A stage: its name and its first and last step."""

    name: str
    first: int
    last: int


@dataclass(frozen=True)
class Series:
    """One curve. points: (step, value), by rising step. spread: half the width of a band around it, a value a point.
    colour, dash: which of those that there are; None: by the series' place in its chart.
    """

    name: str
    points: Sequence[Point]
    spread: Sequence[float] | None = None
    colour: int | None = None
    dash: int | None = None


@dataclass(frozen=True)
class Chart:
    """One chart. about: how to read it, one or two sentences. guides: (value, label) of dashed reference lines.

    unit: "" or "%" (values are shares, shown as percent) or a unit that follows the value.
    log: logarithmic, where every value is above zero (linear otherwise). zero: the axis starts at zero.
    stacked: the series are parts of a sum.
    """

    key: str
    title: str
    about: str
    series: Sequence[Series]
    unit: str = ""
    guides: Sequence[tuple[float, str]] = ()
    log: bool = False
    zero: bool = False
    stacked: bool = False


def draw(chart: Chart, bands: Sequence[Band]) -> Markup:
    """The chart as HTML: plot, read-out and legend. `bands` are the stages; they span the axis of steps."""
    first, last = bands[0].first - 0.5, bands[-1].last + 0.5
    x = Scale(first, last, _step_ticks(bands[0].first, bands[-1].last))
    y = _value_scale(chart)
    curves = svg.element(
        "svg",
        svg.join(_stack(chart, x, y) if chart.stacked else _lines(chart, x, y)),
        viewBox=f"0 0 {SIZE:.0f} {SIZE:.0f}",
        preserveAspectRatio="none",
        width="100%",
        height="100%",
        class_="curves",
    )
    cursor = svg.element("line", class_="cursor", y1=0, y2="100%")
    drawing = svg.join([*_bands(bands, x), *_grid(chart, x, y), curves, cursor])
    canvas = svg.picture(f"chart-{chart.key}", chart.title, describe(chart), drawing, class_="canvas")
    values, latest = _values(chart, bands)
    plot = svg.element(
        "div", canvas, class_="plot", data_chart=values, data_first=first, data_last=last, aria_label=chart.title
    )
    return plot + svg.element("p", latest, class_="readout") + _legend(chart)


def describe(chart: Chart) -> str:
    """The chart in words: per series the first and last value, and the range."""
    parts = []
    for series in chart.series:
        finite = [p for p in series.points if math.isfinite(p[1])]
        if finite:
            low, high = min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])
            parts.append(
                f"{series.name}: {_show(finite[0][1], chart.unit)} at step {finite[0][0]:.0f}, "
                f"{_show(finite[-1][1], chart.unit)} at step {finite[-1][0]:.0f}; lowest {_show(low[1], chart.unit)} "
                f"at step {low[0]:.0f}, highest {_show(high[1], chart.unit)} at step {high[0]:.0f}."
            )
    return " ".join(parts)


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` of the points: the lowest and the highest of each stretch, so no peak is lost."""
    if len(points) <= limit:
        return list(points)
    kept: list[Point] = []
    for start, end in pairwise(len(points) * i // (limit // 2) for i in range(limit // 2 + 1)):
        part = points[start:end]
        finite = [p for p in part if math.isfinite(p[1])] or part[:1]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def smooth(points: Sequence[Point]) -> list[Point]:
    """The running mean over a fortieth of the points; values that are not finite are left out of it."""
    half = max(1, len(points) // 80)
    finite = [p for p in points if math.isfinite(p[1])]
    return [(p[0], fmean(q[1] for q in finite[max(0, i - half) : i + half + 1])) for i, p in enumerate(finite)]


def _value_scale(chart: Chart) -> Scale:
    values = [v for s in chart.series for _, v in s.points if math.isfinite(v)]
    if chart.stacked:
        totals: dict[float, float] = {}
        for series in chart.series:
            for step, value in series.points:
                totals[step] = totals.get(step, 0.0) + (value if math.isfinite(value) else 0.0)
        values = list(totals.values())
    for series in chart.series:
        for (_, value), spread in zip(series.points, series.spread or (), strict=False):
            if math.isfinite(value) and math.isfinite(spread):
                values += [value - spread, value + spread]
    values += [value for value, _ in chart.guides]
    if not values:
        return Scale(0.0, 1.0, [0.0, 1.0])
    low, high = min(values), max(values)
    if chart.log and low > 1e-100:
        start, end = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
        end = max(end, start + 1)
        every = max(1, math.ceil((end - start) / 5))
        return Scale(10.0**start, 10.0**end, [10.0**e for e in range(start, end + 1, every)], log=True)
    if chart.zero or chart.stacked:
        low = min(low, 0.0)
    if high - low < 1e-12 * max(1.0, abs(high)):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad * (not chart.zero), high + pad
    ticks = nice_ticks(low, high, 4)
    return Scale(ticks[0], ticks[-1], ticks)


def _step_ticks(first: int, last: int) -> list[float]:
    if last - first < 6:
        return [float(step) for step in range(first, last + 1)]
    ticks = [t for t in nice_ticks(first, last, 5) if first <= t <= last]
    return [float(first), *(t for t in ticks if t - first > 0.08 * (last - first))]


def _lines(chart: Chart, x: Scale, y: Scale) -> list[Markup]:
    parts = []
    for i, series in enumerate(chart.series):
        if series.spread is not None:
            parts += _spread(series, i, x, y)
        noisy = len(series.points) >= SMOOTH_FROM
        style = _stroke(series, i)
        parts.append(svg.path(_path(thin(series.points), x, y), **style, **({"class_": "raw"} if noisy else {})))
        if noisy:
            parts.append(svg.path(_path(thin(smooth(series.points)), x, y), **style))
    return parts


def _path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    parts, pen_up = [], True
    for step, value in points:
        if not math.isfinite(value):
            pen_up = True
            continue
        # The tiny stroke lets a point with no neighbour show as a dot.
        start, dot = ("M", "l.01 0") if pen_up else ("L", "")
        parts.append(f"{start}{_place(x.at(step))} {_place(1 - y.at(value))}{dot}")
        pen_up = False
    return "".join(parts)


def _spread(series: Series, i: int, x: Scale, y: Scale) -> list[Markup]:
    edges = [
        (step, value - spread, value + spread)
        for (step, value), spread in zip(series.points, series.spread or (), strict=True)
        if math.isfinite(value) and math.isfinite(spread)
    ]
    if not edges:
        return []
    low = thin([(step, low) for step, low, _ in edges])
    high = thin([(step, high) for step, _, high in edges])
    corners = [*high, *reversed(low)]
    d = "L".join(f"{_place(x.at(step))} {_place(1 - y.at(value))}" for step, value in corners)
    return [svg.path(f"M{d}Z", class_="area", fill=_colour(i), fill_opacity=".16")]


def _stack(chart: Chart, x: Scale, y: Scale) -> list[Markup]:
    """One stepped area a series, each step as wide as one step."""
    base: dict[float, float] = {}
    parts = []
    for i, series in enumerate(chart.series):
        boxes = []
        for step, value in series.points:
            if not math.isfinite(value) or value <= 0:
                continue
            bottom = base.get(step, 0.0)
            top = base[step] = bottom + value
            left, right = _place(x.at(step - 0.5)), _place(x.at(step + 0.5))
            boxes.append(
                f"M{left} {_place(1 - y.at(bottom))}V{_place(1 - y.at(top))}H{right}V{_place(1 - y.at(bottom))}Z"
            )
        parts.append(svg.path("".join(boxes), class_="area", fill=_colour(i)))
    return parts


def _bands(bands: Sequence[Band], x: Scale) -> list[Markup]:
    parts = []
    for i, band in enumerate(bands):
        start, end = x.at(band.first - 0.5), x.at(band.last + 0.5)
        if i % 2:
            parts.append(svg.rect(class_="band", x=percent(start), width=percent(end - start), y=0, height="100%"))
        if i:
            parts.append(svg.vertical(percent(start), -16, "100%", class_="boundary"))
        if end - start > 0.12:
            parts.append(svg.text(band.name, class_="stage", x=percent(start), dx=5, y=-6))
    return parts


def _grid(chart: Chart, x: Scale, y: Scale) -> list[Markup]:
    parts = []
    for tick, label in zip(y.ticks, _labels(y, chart.unit), strict=True):
        place = percent(1 - y.at(tick))
        parts.append(svg.horizontal(place, class_="grid"))
        parts.append(svg.text(label, class_="tick", x=-8, y=place, dy=".35em", text_anchor="end"))
    for tick in x.ticks:
        place = percent(x.at(tick))
        parts.append(svg.text(f"{tick:,.0f}", class_="tick", x=place, y="100%", dy="1.6em", text_anchor="middle"))
    for value, label in chart.guides:
        place = percent(1 - y.at(value))
        parts.append(svg.horizontal(place, class_="guide"))
        parts.append(svg.text(label, class_="guide-label", x="100%", y=place, dy=-4, text_anchor="end"))
    return parts


def _labels(scale: Scale, unit: str) -> list[str]:
    """The ticks as people write numbers, the unit at the uppermost: 0.001, 10,000, 1.5 M, 60 %."""
    factor = 100.0 if unit == "%" else 1.0
    ticks = [t * factor for t in scale.ticks]
    top = max(abs(t) for t in ticks)
    size, letter = next(((s, m) for s, m in ((1e9, " G"), (1e6, " M")) if s <= top < 1e12), (1.0, ""))
    if scale.log:
        texts = [_plain(t, max(0, -round(math.log10(t)))) for t in ticks]
    else:
        step = abs(ticks[1] - ticks[0]) / size
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        texts = [_plain(t / size, decimals) + letter if t or not letter else "0" for t in ticks]
    after = {"": "", "%": " %"}.get(unit, f" {unit}")
    texts = [text + after if unit == "%" or i == len(texts) - 1 else text for i, text in enumerate(texts)]
    return [text.replace("-", "−", 1 if text[0] == "-" else 0) for text in texts]


def _plain(value: float, decimals: int) -> str:
    if decimals <= 7 and abs(value) < 1e9:
        return f"{value:,.{decimals}f}"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}·10{str(int(exponent)).translate(SUPERSCRIPT)}"


def _values(chart: Chart, bands: Sequence[Band]) -> tuple[str, str]:
    """The read-out of every step as JSON, [[steps], [texts]], and the text of the last step."""
    steps = sorted({step for series in chart.series for step, _ in thin(series.points)})
    tables = [_texts(series, chart.unit) for series in chart.series]
    texts = []
    for step in steps:
        band = next((b for b in bands if b.first <= step <= b.last), None)
        place = f"step {step:.0f}" + (f" ({band.name} {step - band.first + 1:.0f})" if band and band.name else "")
        figures = [
            f"{series.name} {table[step]}" for series, table in zip(chart.series, tables, strict=True) if step in table
        ]
        texts.append(" · ".join([place, *figures]))
    return json.dumps([[int(step) for step in steps], texts], ensure_ascii=False), texts[-1] if texts else ""


def _texts(series: Series, unit: str) -> dict[float, str]:
    """The value of every step as the read-out shows it."""
    finite = [value for _, value in series.points if math.isfinite(value)]
    span = max(finite) - min(finite) if finite else 0.0
    # Values that differ late (1.00012, 1.00035) need more digits than number() gives.
    digits = math.ceil(-math.log10(span)) + 1 if 0 < span < 0.01 * abs(max(finite)) else 0
    texts = {
        step: f"{value:.{digits}f}" if digits > 0 and not unit else _show(value, unit) for step, value in series.points
    }
    for (step, _), spread in zip(series.points, series.spread or (), strict=False):
        texts[step] += f" ± {_show(spread, unit)}"
    return texts


def _legend(chart: Chart) -> Markup:
    if len(chart.series) < 2:
        return Markup("")
    items = []
    for i, series in enumerate(chart.series):
        if chart.stacked:
            mark = svg.rect(width=22, height=8, y=1, fill=_colour(i))
        else:
            style = {**_stroke(series, i), "stroke_width": 2}
            mark = svg.element("line", x1=0, x2=22, y1=5, y2=5, **style)
        sample = svg.element("svg", mark, width=22, height=10, aria_hidden="true")
        items.append(svg.element("li", sample + series.name))
    return svg.element("ul", svg.join(items), class_="legend")


def _stroke(series: Series, i: int) -> dict[str, object]:
    colour, dash = (i if chosen is None else chosen for chosen in (series.colour, series.dash))
    return {"stroke": _colour(colour), "stroke_dasharray": DASHES[dash % len(DASHES)]}


def _colour(i: int) -> str:
    return f"var(--s{i % 5})"


def _show(value: float, unit: str) -> str:
    text = f"{100 * value:.1f} %" if unit == "%" else f"{number(value)} {unit}".rstrip()
    return "−" + text[1:] if text.startswith("-") else text


def _place(share: float) -> str:
    return f"{SIZE * share:.1f}".removesuffix(".0")
