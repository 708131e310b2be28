"""Line charts as small SVG files for docs/img."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 220, 44, 34, 26
COLOURS = ("#888888", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
DASHES = ("", "6 3", "2 2", "8 2 2 2", "4 1", "1 2")

Point = tuple[float, float]


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
    plot_w, plot_h = WIDTH - LEFT - 8, HEIGHT - BOTTOM - TOP - 16

    def at(x: float, y: float) -> str:
        across = LEFT + plot_w * (x - low) / ((high - low) or 1)
        return f"{across:.1f},{TOP + 16 + plot_h * (1 - min(y, most) / most):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="11" role="img"><title>{escape(title)}</title><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="14" font-weight="bold">{escape(title)}</text>',
    ]
    for share in (0, 0.5, 1):
        x, y = at(low, share * most).split(",")
        parts.append(f'<path d="M{x},{y}H{WIDTH - 8}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{float(y) + 4:.1f}" text-anchor="end">{share * most:.2g}</text>')
    for value, anchor in ((low, "start"), (high, "end")):
        x, y = at(value, 0).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 14:.1f}" text-anchor="{anchor}">{value:g}</text>')
    parts.append(f'<text x="{LEFT + plot_w / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_name)}</text>')
    for i, (name, curves) in enumerate(series.items()):
        style = f'stroke="{COLOURS[i % 6]}" stroke-dasharray="{DASHES[i % 6]}"'
        for curve in curves:
            parts.append(f'<path d="M{"L".join(at(*p) for p in curve)}" fill="none" stroke-width="1.5" {style}/>')
        for x, low_y, high_y in bars.get(name, ()):
            ends = "L".join((at(x, low_y), at(x, high_y)))
            parts.append(f'<path d="M{ends}" class="bar" stroke="{COLOURS[i % 6]}" stroke-opacity=".5"/>')
        x = LEFT + i * plot_w / len(series)
        parts.append(f'<path d="M{x:.0f},26h18" stroke-width="2" {style}/>')
        parts.append(f'<text x="{x + 22:.0f}" y="30">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
