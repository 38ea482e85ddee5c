"""Marks, scales and axes as inline SVG.

Horizontal positions are in percent of the plot, vertical ones in pixels: a drawing gets as wide as its column while its
text keeps its size. Colours come from the page's style sheet, by class, for light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from markupsafe import Markup, escape

HEIGHT = 26
MARGIN = 0.04
SHADES = 5
SERIES = (
    (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2, 2.2, 2.5, 2.8, 3, 3.5, 4, 4.5, 5, 5.5, 6, 7, 8, 9),
    (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8),
    (1, 1.5, 2, 3, 5, 7),
    (1, 2, 5),
)


@dataclass(frozen=True)
class Scale:
    """Maps low..high to 0..100 percent, linearly or in the logarithm (then 0 < low)."""

    low: float
    high: float
    log: bool = field(default=False, kw_only=True)

    @classmethod
    def around(cls, values: Iterable[float], *, log: bool = False) -> Scale:
        """Contains all values with a margin, also around a single value."""
        known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        low, high = (min(known), max(known)) if known else (1.0, 2.0)
        if log:
            span = max(math.log(high / low), 0.1) * MARGIN
            return cls(low / math.exp(span), high * math.exp(span), log=log)
        span = (high - low or abs(high) or 1.0) * MARGIN
        return cls(low - span, high + span)

    def at(self, value: float) -> float:
        """Position in percent; values outside are put on the edge."""
        if self.log:
            part = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return 100 * min(max(part, 0.0), 1.0)

    def ticks(self) -> list[float]:
        """A few round values inside."""
        if self.log:
            return self._decades() if self.high / self.low > 100 else self._mantissas()
        step = _round_step((self.high - self.low) / 4)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [k * step for k in range(first, last + 1)]

    def _decades(self) -> list[float]:
        first, last = math.ceil(math.log10(self.low)), math.floor(math.log10(self.high))
        return [10.0**k for k in range(first, last + 1, max(1, math.ceil((last - first) / 5)))]

    def _mantissas(self) -> list[float]:
        """The finest of some customary series that has no more than six values inside."""
        first, last = math.floor(math.log10(self.low)), math.floor(math.log10(self.high))
        for series in SERIES:
            found = [step * 10.0**k for k in range(first, last + 1) for step in series]
            inside = [v for v in found if self.low <= v <= self.high]
            if len(inside) <= 6:
                return inside
        return [10.0**k for k in range(first + 1, last + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(step for step in (1, 2, 2.5, 5, 10) if step * power >= rough * (1 - 1e-9))


def element(tag: str, *children: Markup | str, **attributes: str | float) -> Markup:
    """One element, texts and values escaped.

    `class_` becomes class, other underscores become hyphens.
    """
    words = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_text(value))}"' for name, value in attributes.items()
    )
    inside = Markup("").join(children)
    return Markup(f"<{tag}{words}>{inside}</{tag}>")


def mark(shape: Markup, said: str) -> Markup:
    """A shape with a title: shown on hover and on keyboard focus."""
    return element("g", element("title", said), shape, class_="m")


def bar(scale: Scale, start: float, end: float, class_: str, *, y: float = 5, height: float = HEIGHT - 10) -> Markup:
    """A bar from `start` to `end`, at least 0.25 % wide."""
    left, right = sorted((scale.at(start), scale.at(end)))
    return element("rect", x=_percent(left), y=y, width=_percent(max(right - left, 0.25)), height=height, class_=class_)


def whisker(scale: Scale, low: float, high: float, *, y: float = HEIGHT / 2) -> Markup:
    """An interval: a line with a cap at each end, open where the end is outside the scale."""
    left, right = _percent(scale.at(low)), _percent(scale.at(high))
    caps = [
        element("line", x1=x, x2=x, y1=y - 4, y2=y + 4)
        for value, x in ((low, left), (high, right))
        if scale.low <= value <= scale.high
    ]
    return element("g", element("line", x1=left, x2=right, y1=y, y2=y), *caps, class_="ci")


def dot(scale: Scale, value: float, class_: str, *, radius: float = 4, y: float = HEIGHT / 2) -> Markup:
    """A point."""
    return element("circle", cx=_percent(scale.at(value)), cy=y, r=radius, class_=class_)


def upright(scale: Scale, value: float, class_: str, *, height: float = HEIGHT) -> Markup:
    """A vertical line through a row."""
    x = _percent(scale.at(value))
    return element("line", x1=x, x2=x, y1=0, y2=height, class_=class_)


def grid(scale: Scale, *, height: float = HEIGHT) -> Markup:
    """The vertical lines of the ticks, behind a row's marks."""
    return Markup("").join(upright(scale, value, "grid", height=height) for value in scale.ticks())


def curve(points: Sequence[tuple[float, float]]) -> Markup:
    """Straight lines from point to point, each (percent across, pixels down)."""
    pairs = pairwise(points)
    lines = (element("line", x1=_percent(a), y1=b, x2=_percent(c), y2=d) for (a, b), (c, d) in pairs)
    return element("g", *lines, class_="curve")


def strip(parts: Mapping[int, float], places: int, *, height: float) -> Markup:
    """One bar a place; height and shade both show the part (0..1) of the largest value.

    Bars of one shade are one path: a model has hundreds of bars.
    """
    paths: dict[int, str] = {}
    for place, part in sorted(parts.items()):
        shade = min(SHADES, 1 + int(SHADES * part))
        top = height - max(1.0, (height - 4) * part)
        paths[shade] = paths.get(shade, "") + f"M{place} {_text(height)}V{_text(top)}h.88V{_text(height)}"
    drawn = (element("path", d=d, class_=f"q{shade}") for shade, d in sorted(paths.items()))
    box = {"viewBox": f"0 0 {places} {_text(height)}", "preserveAspectRatio": "none"}
    return element("svg", *drawn, aria_hidden="true", **box)


def axis(scale: Scale, unit: str = "") -> Markup:
    """Tick labels, for the row under the plot."""
    return Markup("").join(label(scale.at(value), f"{_tick(value)}{unit}") for value in scale.ticks())


def label(at: float, text: str) -> Markup:
    """A text under the plot, at a percentage of its width."""
    anchor = "start" if at < 3 else "end" if at > 97 else "middle"
    return element("text", text, x=_percent(at), y=14, text_anchor=anchor)


def _tick(value: float) -> str:
    if abs(value) < 1e-12:
        return "0"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e+") if abs(value) < 1e-3 else f"{value:.6g}"


def _percent(value: float) -> str:
    return f"{_text(value)}%"


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
