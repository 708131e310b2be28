"""Line charts as small SVG files for docs/measured/img."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from gadcore.report import svg
from gadcore.report.svg import Point, Scale

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 220, 44, 34, 26
COLOURS = ("#888888", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
DASHES = ("", "6 3", "2 2", "8 2 2 2", "4 1", "1 2")


def lines(
    title: str,
    x_name: str,
    series: dict[str, Sequence[Sequence[Point]]],
    *,
    top: float | None = None,
    bars: dict[str, Sequence[tuple[float, float, float]]] | None = None,
) -> str:
    """A chart of named series, each of one or more curves (a seed each); y from 0. top: values above are cut there.

    bars: (x, low, high) of upright lines by name of a series: intervals.
    """
    points = [p for curves in series.values() for curve in curves for p in curve]
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    bars = bars or {}
    heights = [y for _, y in points] + [y for row in bars.values() for _, _, y in row]
    most = top or 1.05 * max(heights) or 1.0
    across, up = Scale(low, high if high > low else low + 1), Scale(0.0, most)
    plot_w, plot_h = WIDTH - LEFT - 8, HEIGHT - BOTTOM - TOP - 16

    def at(x: float, y: float) -> tuple[str, float]:
        return f"{LEFT + plot_w * across.at(x):.1f}", TOP + 16 + plot_h * (1 - up.at(min(y, most)))

    def curve_of(points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{x},{y:.1f}" for x, y in (at(*point) for point in points))

    parts = [
        svg.element("title", title) + svg.rect(width="100%", height="100%", fill="white"),
        svg.text(title, x=LEFT, y=14, font_weight="bold"),
    ]
    for share in (0, 0.5, 1):
        x, y = at(low, share * most)
        parts.append(svg.path(f"M{x},{y:.1f}H{WIDTH - 8}", stroke="#ddd"))
        parts.append(svg.text(f"{share * most:.2g}", x=LEFT - 4, y=f"{y + 4:.1f}", text_anchor="end"))
    for value, anchor in ((low, "start"), (high, "end")):
        x, y = at(value, 0)
        parts.append(svg.text(f"{value:g}", x=x, y=f"{y + 14:.1f}", text_anchor=anchor))
    parts.append(svg.text(x_name, x=LEFT + plot_w / 2, y=HEIGHT - 6, text_anchor="middle"))
    for i, (name, curves) in enumerate(series.items()):
        colour = COLOURS[i % 6]
        style = {"stroke": colour, "stroke_dasharray": DASHES[i % 6]}
        parts += [svg.path(curve_of(curve), fill="none", stroke_width=1.5, **style) for curve in curves]
        for x_at, low_y, high_y in bars.get(name, ()):
            ends = curve_of([(x_at, low_y), (x_at, high_y)])
            parts.append(svg.path(ends, class_="bar", stroke=colour, stroke_opacity=".5"))
        begin = LEFT + i * plot_w / len(series)
        parts.append(svg.path(f"M{begin:.0f},26h18", stroke_width=2, **style))
        parts.append(svg.text(name, x=f"{begin + 22:.0f}", y=30))
    drawing = svg.element(
        "svg",
        Markup("\n").join([*parts, ""]),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        font_family="sans-serif",
        font_size=11,
        role="img",
    )
    return drawing + "\n"
