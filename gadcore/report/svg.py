"""The elements of an SVG drawing as text, and the scale of an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from gadcore.text import visible

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Maps values to 0..1, upwards; ticks lie inside. log: of values above zero."""

    low: float
    high: float
    ticks: Sequence[float] = ()
    log: bool = False

    def at(self, value: float) -> float:
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values (1, 2 or 5 times a power of ten apart) that enclose low..high."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(start, end + 1)]


def element(name: str, content: str | None = None, /, **attributes: object) -> Markup:
    """<name attributes>content</name>; text is escaped, Markup (other elements) is not; None: it has no content.

    attributes: in their order; class_ stands for class, stroke_width for stroke-width.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(visible(str(value)))}"' for key, value in attributes.items()
    )
    return Markup(f"<{name}{written}/>" if content is None else f"<{name}{written}>{_shown(content)}</{name}>")


def _shown(content: str) -> Markup:
    return content if isinstance(content, Markup) else escape(visible(content))


def text(content: str, /, **attributes: object) -> Markup:
    return element("text", content, **attributes)


def rect(**attributes: object) -> Markup:
    return element("rect", **attributes)


def path(d: str, /, **attributes: object) -> Markup:
    """d: the commands of the pen."""
    return element("path", d=d, **attributes)


def vertical(x: object, top: object, bottom: object, content: str | None = None, /, **attributes: object) -> Markup:
    """A line down the drawing."""
    return element("line", content, **attributes, x1=x, x2=x, y1=top, y2=bottom)


def horizontal(y: object, /, **attributes: object) -> Markup:
    """A line across the whole drawing."""
    return element("line", **attributes, x1=0, x2="100%", y1=y, y2=y)


def join(elements: Sequence[Markup]) -> Markup:
    return Markup("").join(elements)


def percent(share: float) -> str:
    """A length as a share of the drawing."""
    return f"{share:.2%}"


def picture(name: str, title: str, description: str, content: Markup, /, **attributes: object) -> Markup:
    """An <svg> with its title and description for those who cannot see it. name: the ids' own part."""
    labels = element("title", title, id=f"{name}-title") + element("desc", description, id=f"{name}-desc")
    return element("svg", labels + content, role="img", aria_labelledby=f"{name}-title {name}-desc", **attributes)
