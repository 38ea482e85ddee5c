"""The report's figures: rows of a label, an SVG drawing and a value as text, over one axis.

Text is formatted as in the tables; drawings show the report's numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from markupsafe import Markup

from requant_eval.metrics.records import EvaluationSet, KernelStep
from requant_eval.render import svg
from requant_eval.render.chart import Chart, Row
from requant_eval.render.document import Figure
from requant_eval.render.module_maps import module_maps
from requant_eval.render.set_tables import served, what
from requant_eval.render.svg import Scale
from requant_eval.report.number_format import format_estimate, format_value

QUANTILES = (("median", "median"), ("p90", "p90"), ("p95", "p95"), ("p99", "p99"), ("p99_9", "p99.9"), ("max", "max"))
FLIPS = (("right_to_wrong", -1, "worse", "right -> wrong"), ("wrong_to_right", 1, "better", "wrong -> right"))
CONTROLS = ("control", "fork")
TALL = 120  # pixels of a curve


def charts(figure: Figure) -> list[Chart]:
    """The drawings of one figure of the document; none where there is nothing to draw."""
    match figure.kind:
        case "steps":
            found = [waterfall(figure.data), losses(figure.data)]
        case "kl":
            found = [ladder(figure.data)]
        case "flips":
            found = [flips(figure.data)]
        case "tails":
            found = tails(figure.data)
        case "healing":
            found = [healing(figure.data)]
        case "modules":
            found = module_maps(figure.data)
    return [chart for chart in found if chart.rows]


def waterfall(s: Mapping[str, Any]) -> Chart:
    """Perplexity of every variant, as a bar from the variant that it was made of."""
    into: dict[str, Any] = {e["to"]: e for e in _steps(s)}
    level = {v["name"]: v["mean_nll"]["value"] for v in s["variants"]}
    for label, served_by in _served(s).items():
        into[label], level[label] = served_by, level[served_by["from"]] + served_by["delta"]["value"]
    level = dict(sorted(level.items(), key=lambda item: item[0] in into and into[item[0]]["kind"] in CONTROLS))
    reached = list(into.values())
    ends = [math.exp(level[e["from"]] + e["delta"][k]) for e in reached for k in ("value", "low", "high") if _has(e, k)]
    scale = Scale.around([*ends, *(math.exp(v) for v in level.values())], log=True)
    rows = []
    for name, value in level.items():
        ppl = math.exp(value)
        text = f"perplexity {_ppl(s, name) or format_value(ppl)}"
        if name not in into:
            shape = svg.mark(svg.dot(scale, ppl, "level"), f"{name}: {text}")
            rows.append(Row(label=name, drawing=svg.grid(scale) + shape, value=_ppl(s, name)))
            continue
        e = into[name]
        change = format_estimate(e["loss_percent"], signed=True, unit=" %", interval=False)
        said = f"{e['from']} -> {name}: {format_estimate(e['delta'], signed=True)} ln perplexity, to {text}"
        drawn = svg.grid(scale) + svg.mark(_step(scale, e, level), said)
        rows.append(Row(label=name, drawing=drawn, value=_ppl(s, name), aside=change, note=what(e)))
    caption = (
        "Perplexity from the base to what ships. Each bar leads from the variant a step starts at to its own level;"
    )
    caption += " the line at its end is the step's 95 % interval."
    legend = (("better", "lower: better"), ("worse", "higher: worse"), ("control", "control"))
    return Chart(caption=caption, rows=tuple(rows), axis=svg.axis(scale), unit="perplexity, log scale", legend=legend)


def _steps(s: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The first edge into each variant: the way it was made."""
    into: dict[str, Mapping[str, Any]] = {}
    for e in s["edges"]:
        if _known(e["delta"]):
            into.setdefault(e["to"], e)
    return list(into.values())


def _served(s: Mapping[str, Any]) -> dict[str, KernelStep]:
    """Steps into engines from variants that were scored, by a name of their own."""
    scored = [v["name"] for v in s["variants"]]
    return {f"{e['from']} in {e['to']}": e for e in served(cast("EvaluationSet", s)) if e["from"] in scored}


def _step(scale: Scale, e: Mapping[str, Any], level: Mapping[str, float]) -> Markup:
    start, delta = level[e["from"]], e["delta"]
    end = start + delta["value"]
    class_ = "control" if e["kind"] in CONTROLS else "worse" if delta["value"] > 0 else "better"
    drawn = svg.bar(scale, math.exp(start), math.exp(end), class_)
    if _has(e, "low"):
        drawn += svg.whisker(scale, math.exp(start + delta["low"]), math.exp(start + delta["high"]))
    return drawn


def losses(s: Mapping[str, Any]) -> Chart:
    """Loss of each variant against the reference, on a scale of its own.

    Controls outside of the scale are drawn at its edge.
    """
    edges = [e for e in s["edges"] if e["from"] == s["reference"] and _known(e["loss_percent"])]
    near = [e for e in edges if e["kind"] != "control"]
    ends = [e["loss_percent"][k] for e in near for k in ("value", "low", "high") if e["loss_percent"][k] is not None]
    if not near:
        return Chart(caption="", rows=())
    limits = [g["limit"] for g in s["gates"] if g["metric"] == "ppl_increase" and g["relative_to"] is None]
    scale = Scale.around([0.0, *ends, *limits])
    behind = svg.grid(scale) + svg.upright(scale, 0, "zero")
    behind += Markup("").join(svg.upright(scale, limit, "limit") for limit in limits)
    rows = []
    for e in edges:
        loss, text = e["loss_percent"], format_estimate(e["loss_percent"], signed=True, unit=" %")
        if loss["value"] > scale.high or loss["value"] < scale.low:
            shape = svg.element("text", "off the scale ->", x="100%", y=17, text_anchor="end")
        else:
            shape = svg.dot(scale, loss["value"], "level")
            if loss["low"] is not None:
                shape = svg.whisker(scale, loss["low"], loss["high"]) + shape
        drawn = behind + svg.mark(shape, f"{e['to']} against {s['reference']}: perplexity {text}")
        rows.append(Row(label=e["to"], drawing=drawn, value=text))
    caption = (
        f"The loss against {s['reference']} enlarged: point and 95 % interval; an interval that touches the zero line"
    )
    caption += " is no proven loss." + (" Dashed: the gate's limit." if limits else "")
    return Chart(caption=caption, rows=tuple(rows), axis=svg.axis(scale, " %"), unit="change of perplexity")


def ladder(s: Mapping[str, Any]) -> Chart:
    """Quantiles of the tokens' KL on a logarithmic axis."""
    edges = [e for e in s["edges"] if e["kl"] is not None]
    known = [e["kl"][k] for e in edges for k, _ in QUANTILES if e["kl"][k]]
    if not known:
        return Chart(caption="", rows=())
    scale = Scale.around(known, log=True)
    rows = []
    for e in edges:
        drawn, kl = svg.grid(scale), e["kl"]
        steps = [(key, name, kl[key]) for key, name in QUANTILES if kl[key] is not None]
        if steps:
            drawn += svg.bar(scale, max(steps[0][2], scale.low), max(steps[-1][2], scale.low), "span", y=12, height=2)
        for number, (key, name, value) in enumerate(steps):
            radius = 6 - 0.7 * number
            shape = svg.dot(scale, value, "level" if key == "median" else "open", radius=radius)
            drawn += svg.mark(shape, f"{e['to']}: {name} {format_value(value)} nats")
        rows.append(Row(label=e["to"], drawing=drawn, value=f"p99 {format_value(kl['p99'])}"))
    caption = f"How far each token's prediction moved from {s['reference']}'s, KL: from left to right the median"
    caption += " (filled), then p90, p95, p99, p99.9 and the largest, ever smaller."
    return Chart(caption=caption, rows=tuple(rows), axis=svg.axis(scale), unit="nats per token, log scale")


def flips(s: Mapping[str, Any]) -> Chart:
    """Tokens that turned wrong (bars to the left) and right (bars to the right), by step."""
    both = ("right_to_wrong", "wrong_to_right")
    edges = [e for e in _steps(s) if all(_known(e[k]) for k in both)]
    if not edges:
        return Chart(caption="", rows=())
    reach = max(100 * (e[k]["high"] if e[k]["high"] is not None else e[k]["value"]) for e in edges for k in both)
    scale = Scale.around([-reach, reach]) if reach else Scale(-1, 1)
    rows = []
    for e in edges:
        drawn, texts = svg.grid(scale) + svg.upright(scale, 0, "zero"), []
        for key, sign, class_, words in FLIPS:
            share = e[key]
            shape = svg.bar(scale, 0, 100 * sign * share["value"], class_)
            if share["low"] is not None:
                low, high = sorted(100 * sign * share[end] for end in ("low", "high"))
                shape += svg.whisker(scale, low, high)
            texts.append(format_estimate(share, factor=100, unit=" %", interval=False))
            full = format_estimate(share, factor=100, unit=" %")
            drawn += svg.mark(shape, f"{e['from']} -> {e['to']}: {words} {full}")
        rows.append(Row(label=f"{e['from']} -> {e['to']}", drawing=drawn, value=" | ".join(texts)))
    caption = (
        "Tokens whose most likely prediction turned wrong (left) or right (right) at each step, with 95 % intervals."
    )
    legend = (("worse", "right -> wrong"), ("better", "wrong -> right"))
    return Chart(
        caption=caption, rows=tuple(rows), axis=svg.axis(scale, " %"), unit="of the scored tokens", legend=legend
    )


def tails(s: Mapping[str, Any]) -> list[Chart]:
    """Loss by tenth of the tokens, a chart for each variant.

    The control has one only where no other variant was scored.
    """
    names = [name for name in s["tails"]["variants"] if name not in ("merged", "original")]
    return [_tails(s, name) for name in names if name != "rtn" or len(names) == 1]


def _tails(s: Mapping[str, Any], name: str) -> Chart:
    groups, losses = s["tails"]["groups"], s["tails"]["variants"][name]["loss"]
    ends = [loss[k] for loss in losses for k in ("value", "low", "high") if loss[k] is not None]
    scale = Scale.around([0.0, *ends])
    rows = []
    for number, (group, loss) in enumerate(zip(groups, losses, strict=True), 1):
        text = format_estimate(loss, signed=True)
        shape = svg.bar(scale, 0, loss["value"], "worse" if loss["value"] > 0 else "better")
        if loss["low"] is not None:
            shape += svg.whisker(scale, loss["low"], loss["high"])
        label = f"{number} of {len(groups)}"
        said = f"{name}, tokens {label}, ln p changed by {group['low']:.3g} to {group['high']:.3g}: {text} nats a token"
        drawn = svg.grid(scale) + svg.upright(scale, 0, "zero") + svg.mark(shape, said)
        rows.append(Row(label=label, drawing=drawn, value=text))
    caption = f"{name}: loss of the tokens by how much the adapter had changed them, least changed first. Long bars at the end"
    caption += " are learned behaviour that was lost, equal bars are general noise."
    return Chart(caption=caption, rows=tuple(rows), axis=svg.axis(scale), unit=f"nats a token against {s['reference']}")


def healing(facts: Mapping[str, Any]) -> Chart:
    """KL on held-out text by step of healing; the chosen step is filled."""
    points = [(float(step), float(value)) for step, value in facts.get("held") or [] if value is not None and value > 0]
    if len(points) < 2:
        return Chart(caption="", rows=())
    across, up = Scale(0.0, max(step for step, _ in points) or 1.0), Scale.around([v for _, v in points], log=True)
    place = [(across.at(step), (TALL - 8) * (1 - up.at(value) / 100) + 4) for step, value in points]
    drawn = svg.grid(across, height=TALL) + svg.curve(place)
    for (step, value), (_, y) in zip(points, place, strict=True):
        shape = svg.dot(across, step, "level" if step == facts.get("best_step") else "open", y=y)
        drawn += svg.mark(shape, f"step {step:.0f}: {format_value(value)} nats a token")
    values = [value for _, value in points]
    row = Row(
        label="KL, log scale",
        drawing=drawn,
        value=f"{format_value(max(values))} .. {format_value(min(values))}",
        height=TALL,
    )
    caption = "Healing: distance from its teacher on held-out text by step, higher is farther; the filled point is what was kept."
    return Chart(caption=caption, rows=(row,), axis=svg.axis(across), unit="steps")


def _ppl(s: Mapping[str, Any], name: str) -> str:
    """Of a variant; empty for what was not scored on the whole set."""
    return next((format_estimate(v["ppl"], interval=False) for v in s["variants"] if v["name"] == name), "")


def _known(estimate: Mapping[str, Any] | None) -> bool:
    return estimate is not None and estimate["value"] is not None


def _has(edge: Mapping[str, Any], key: str) -> bool:
    return edge["delta"][key] is not None
