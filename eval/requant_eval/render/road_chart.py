"""The picture of the roads: loss against bytes, what ships filled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from markupsafe import Markup

from requant_eval.render import svg
from requant_eval.render.chart import Chart, Row
from requant_eval.render.road_tables import label
from requant_eval.render.svg import Scale
from requant_eval.report.number_format import format_bytes, format_estimate, format_value
from requant_eval.report.records import Road

TALL = 260  # pixels
LINE = 15  # pixels between two names
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))


class Placed(NamedTuple):
    """A road that can be drawn. size: bytes. loss: percent; interval: its ends where they are known."""

    road: Road
    size: int
    loss: float
    interval: tuple[float, float] | None


def loss_by_bytes(roads: Sequence[Road], home: str) -> Chart:
    """One point a quantized road: bytes to the right, loss on the set `home` upwards with its interval.

    The loss is logarithmic where every road loses.
    """
    points = sorted(_placed(roads, home), key=lambda p: -p.loss)
    if len(points) < 2:
        return Chart(caption="", rows=())
    unit, one = next(((name, size) for name, size in UNITS if max(p.size for p in points) >= size), ("B", 1.0))
    least, most = points[-1].loss, points[0].loss
    ends = [end for p in points for end in p.interval or ()]
    up = Scale.around([least, most, *(end for end in ends if least <= 0 or end > least / 10)], log=least > 0)
    sizes = [p.size / one for p in points]
    across = Scale.around([*sizes, min(sizes) / 1.04, max(sizes) * 1.02])
    drawn, names, free = svg.grid(across, height=TALL) + _levels(up), Markup(), {"start": 0.0, "end": 0.0}
    for p, size in zip(points, sizes, strict=True):
        at, y = across.at(size), _down(up, p.loss)
        said = f"{label(p.road)}: perplexity {format_estimate(p.road['loss'][home], signed=True, unit=' %')}"
        drawn += svg.mark(_point(across, up, p, size), f"{said}, {format_bytes(p.size)}")
        anchor, aside = ("start", "9") if at < 60 else ("end", "-9")
        line = max(y + 4, free[anchor])  # a name below another one, not over it
        free[anchor] = line + LINE
        names += svg.element("text", p.road["name"], x=f"{at:.2f}%", dx=aside, y=line, text_anchor=anchor)
    row = Row(
        label="loss in %" + (", log scale" if up.log else ""),
        drawing=drawn + names,
        value=f"{format_value(least, signed=True)} .. {format_value(most, signed=True)} %",
        height=TALL,
    )
    caption = (
        f"Loss against bytes on {home}: lower and further left is better. Filled: what ships. Lines: 95 % intervals."
    )
    return Chart(caption=caption, rows=(row,), axis=svg.axis(across, f" {unit}"), unit="weights on disk")


def _placed(roads: Sequence[Road], home: str) -> Iterator[Placed]:
    for road in roads:
        loss = road["loss"].get(home)
        if road["name"] == "merged" or not road["bytes"] or loss is None or loss["value"] is None:
            continue
        low, high = loss["low"], loss["high"]
        yield Placed(road, road["bytes"], loss["value"], None if low is None or high is None else (low, high))


def _point(across: Scale, up: Scale, p: Placed, size: float) -> Markup:
    """A dot, filled for what ships, over its interval."""
    shape = Markup()
    if p.interval:
        x, bottom, top = f"{across.at(size):.2f}%", *(_down(up, end) for end in p.interval)
        shape = svg.element("g", svg.element("line", x1=x, x2=x, y1=top, y2=bottom), class_="ci")
    return shape + svg.dot(across, size, "level" if p.road["ships"] else "open", radius=5, y=_down(up, p.loss))


def _down(up: Scale, value: float) -> float:
    """Pixels from the top."""
    return (TALL - 16) * (1 - up.at(value) / 100) + 8


def _levels(up: Scale) -> Markup:
    """Horizontal lines of the ticks, with their values."""
    drawn = Markup()
    for value in up.ticks():
        y = _down(up, value)
        drawn += svg.element("line", x1="0%", x2="100%", y1=y, y2=y, class_="grid")
        drawn += svg.element("text", f"{value:+.4g} %", x="0%", y=y - 3)
    return drawn
