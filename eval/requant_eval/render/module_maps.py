"""Heat maps by module kind and layer: relative output error and signal to noise."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence

from markupsafe import Markup

from requant_eval.metrics.facts import Facts, ModuleFacts
from requant_eval.render import svg
from requant_eval.render.chart import Chart, Row
from requant_eval.render.svg import Scale
from requant_eval.report.number_format import format_value

LAYER = re.compile(r"(?:.*?\.)?(\d+)\.(.+)")
EXPERT = re.compile(r"(?<=\.)\d+(?=\.)")
STRIP = 30  # pixels of a row of the module map


def module_maps(facts: Facts) -> list[Chart]:
    """Maps, layer x module, of relative output error and of the adapter's signal to noise."""
    modules = (facts.get("quantize") or {}).get("modules") or []
    error = "Relative output error of every quantized linear"
    signal = "How loud the adapter is against the quantization error of its linear (1: as loud), on a log scale"
    return [module_map(modules, "relative_error", error), module_map(modules, "signal_to_noise", signal, log=True)]


def module_map(modules: Sequence[ModuleFacts], key: str, what: str, *, log: bool = False) -> Chart:
    """One row a kind of linear, one bar a layer; height and shade both show the value.

    Modules that share a place (experts) are drawn as the worst of them: the largest error, the smallest signal.
    """
    found = _places(modules, key, worst=min if log else max)
    every = [value for row in found.values() for value in row.values() if value > 0]
    if not every:
        return Chart(caption="", rows=())
    layers, top = max(layer for row in found.values() for layer in row) + 1, max(every)
    scale = Scale(min(every) / 2, top, log=True) if log else Scale(0.0, top)
    rows = []
    for kind, row in found.items():
        drawn = svg.strip({layer: scale.at(value) / 100 for layer, value in row.items()}, layers, height=STRIP)
        values = tuple((layer, format_value(value)) for layer, value in sorted(row.items()))
        worst = (min if log else max)(row, key=lambda layer: row[layer])
        middle = format_value(statistics.median(row.values()))
        said = f"{len(row)} layers, median {middle}, worst {format_value(row[worst])} in layer {worst}"
        rows.append(
            Row(
                label=kind,
                drawing=drawn,
                value=f"{middle} .. {format_value(row[worst])}",
                said=said,
                height=STRIP,
                places=layers,
                values=values,
            )
        )
    first = [layer for layer in Scale(0, layers).ticks() if layer < layers and layer == int(layer)]
    axis = Markup("").join(svg.label(100 * (layer + 0.44) / layers, f"{layer:.0f}") for layer in first)
    caption = (
        f"{what}, first layer left, last right; full height and darkest is {format_value(top)}. Beside each row its"
    )
    caption += " median and its worst."
    return Chart(caption=caption, rows=tuple(rows), axis=axis, unit="layer")


def _places(
    modules: Sequence[ModuleFacts], key: str, *, worst: Callable[[float, float], float]
) -> dict[str, dict[int, float]]:
    """{kind: {layer: value}} in the model's order; a kind gets its last name if that is unique."""
    full: dict[str, dict[int, float]] = {}
    for m in modules:
        place, value = LAYER.fullmatch(str(m.get("name", ""))), m.get(key)
        if place is None or not isinstance(value, int | float) or value < 0:
            continue
        row = full.setdefault(EXPERT.sub("*", f".{place[2]}")[1:], {})
        row[int(place[1])] = worst(value, row.get(int(place[1]), value))
    last = [kind.rsplit(".", 1)[-1] for kind in full]
    return {(end if last.count(end) == 1 else kind): row for (kind, row), end in zip(full.items(), last, strict=True)}
