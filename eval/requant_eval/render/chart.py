"""What a chart is: rows of a label, an SVG drawing and a value as text, over one axis."""

from __future__ import annotations

from dataclasses import dataclass, field

from markupsafe import Markup

from requant_eval.render import svg


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a chart.

    note: small text after the label. value, aside: the number that the drawing shows, and a second one in grey.
    said: the drawing in words, for screen readers, where label and value do not say it.
    places, values: of a strip, the number of its places and (place, text) of the filled ones, for the page's script.
    """

    label: str
    drawing: Markup
    value: str = ""
    aside: str = ""
    note: str = ""
    said: str = ""
    height: int = svg.HEIGHT
    places: int = 0
    values: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Rows over one axis.

    caption: how to read it. legend: (CSS class of a sample, its meaning).
    """

    caption: str
    rows: tuple[Row, ...]
    axis: Markup = field(default_factory=Markup)
    unit: str = ""
    legend: tuple[tuple[str, str], ...] = ()
