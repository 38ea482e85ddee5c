"""The report's figures: rows of a label, an SVG drawing and a value as text, over one axis.

Text is formatted as in the tables; drawings show the report's numbers.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from markupsafe import Markup

from requant_eval.metrics.facts import HealFacts
from requant_eval.metrics.lookup import ROADS
from requant_eval.metrics.records import Edge, Estimate, EvaluationSet, KernelStep, Tails
from requant_eval.render import svg
from requant_eval.render.chart import Chart, Row
from requant_eval.render.document import Figure, HealingFigure, ModulesFigure, RoadsFigure, SetFigure, SetWithGates
from requant_eval.render.module_maps import module_maps
from requant_eval.render.road_chart import loss_by_bytes
from requant_eval.render.set_tables import served, what
from requant_eval.render.svg import Scale
from requant_eval.report.number_format import format_estimate, format_value

Quantile = Literal["median", "p90", "p95", "p99", "p99_9", "max"]
Flip = Literal["right_to_wrong", "wrong_to_right"]
QUANTILES: tuple[tuple[Quantile, str], ...] = (
    ("median", "median"),
    ("p90", "p90"),
    ("p95", "p95"),
    ("p99", "p99"),
    ("p99_9", "p99.9"),
    ("max", "max"),
)
FLIPS: tuple[tuple[Flip, int, str, str], ...] = (
    ("right_to_wrong", -1, "worse", "right -> wrong"),
    ("wrong_to_right", 1, "better", "wrong -> right"),
)
CONTROLS = ("control", "fork", "road")
BESIDE = ("rtn", *ROADS)  # variants that no run deploys
TALL = 120  # pixels of a curve
FARTHEST = 300.0  # nats per token, either way: what a scale can still show as perplexity


class Point(NamedTuple):
    """An estimate that can be drawn: its value, and the ends of its interval where it has one."""

    value: float
    interval: tuple[float, float] | None

    @property
    def numbers(self) -> tuple[float, ...]:
        """All that the scale has to show."""
        return (self.value, *(self.interval or ()))


def point(estimate: Estimate | None) -> Point | None:
    """None where the value is not known."""
    if estimate is None or (value := estimate["value"]) is None:
        return None
    low, high = estimate["low"], estimate["high"]
    return Point(value, None if low is None or high is None else (low, high))


def charts(figure: Figure) -> list[Chart]:
    """The drawings of one figure of the document; none where there is nothing to draw."""
    found: list[Chart] = []
    match figure:
        case SetFigure(kind="steps", data=s):
            found = [waterfall(s), losses(s)]
        case SetFigure(kind="kl", data=s):
            found = [ladder(s)]
        case SetFigure(kind="flips", data=s):
            found = [flips(s)]
        case SetFigure(kind="tails", data=s):
            found = tails(s)
        case HealingFigure(data=facts):
            found = [healing(facts)]
        case RoadsFigure(data=roads, home=home):
            found = [loss_by_bytes(roads, home)]
        case ModulesFigure(data=facts):
            found = module_maps(facts)
    return [chart for chart in found if chart.rows]


def waterfall(s: EvaluationSet) -> Chart:
    """Perplexity of every variant, as a bar from the variant that it was made of."""
    level = {v["name"]: mean.value for v in s["variants"] if (mean := point(v["mean_nll"]))}
    into: dict[str, tuple[Edge | KernelStep, Point]] = {
        e["to"]: (e, delta) for e, delta in _steps(s) if e["from"] in level and e["to"] in level
    }
    for label, step, delta in _served(s):
        if step["from"] in level:
            into[label], level[label] = (step, delta), level[step["from"]] + delta.value
    level = dict(sorted(level.items(), key=lambda item: item[0] in into and into[item[0]][0]["kind"] in CONTROLS))
    ends = [_perplexity(level[e["from"]] + x) for e, delta in into.values() for x in delta.numbers]
    scale = Scale.around([*ends, *(_perplexity(v) for v in level.values())], log=True)
    rows = []
    for name, value in level.items():
        ppl = _perplexity(value)
        text = f"perplexity {_ppl(s, name) or format_value(ppl)}"
        if name not in into:
            shape = svg.mark(svg.dot(scale, ppl, "level"), f"{name}: {text}")
            rows.append(Row(label=name, drawing=svg.grid(scale) + shape, value=_ppl(s, name)))
            continue
        e, delta = into[name]
        change = format_estimate(e["loss_percent"], signed=True, unit=" %", interval=False)
        said = f"{e['from']} -> {name}: {format_estimate(e['delta'], signed=True)} ln perplexity, to {text}"
        drawn = svg.grid(scale) + svg.mark(_step(scale, level[e["from"]], delta, control=e["kind"] in CONTROLS), said)
        rows.append(Row(label=name, drawing=drawn, value=_ppl(s, name), aside=change, note=what(e)))
    caption = (
        "Perplexity from the base to what ships. Each bar leads from the variant a step starts at to its own level;"
    )
    caption += " the line at its end is the step's 95 % interval."
    legend = (("better", "lower: better"), ("worse", "higher: worse"), ("control", "control"))
    return Chart(caption=caption, rows=tuple(rows), axis=svg.axis(scale), unit="perplexity, log scale", legend=legend)


def _steps(s: EvaluationSet) -> list[tuple[Edge, Point]]:
    """The first edge into each variant, the way it was made, and its ln perplexity."""
    into: dict[str, tuple[Edge, Point]] = {}
    for e in s["edges"]:
        if delta := point(e["delta"]):
            into.setdefault(e["to"], (e, delta))
    return list(into.values())


def _served(s: EvaluationSet) -> list[tuple[str, KernelStep, Point]]:
    """Steps into engines from variants that were scored, by a name of their own, and their ln perplexity."""
    scored = [v["name"] for v in s["variants"]]
    known = [(e, delta) for e in served(s) if e["from"] in scored and (delta := point(e["delta"]))]
    return [(f"{e['from']} in {e['to']}", e, delta) for e, delta in known]


def _perplexity(nats: float) -> float:
    """exp of a mean loss, for a place on a scale: within what a scale can show."""
    return math.exp(min(max(nats, -FARTHEST), FARTHEST))


def _step(scale: Scale, start: float, delta: Point, *, control: bool) -> Markup:
    """A bar from one ln perplexity to the next, and the interval at its end."""
    class_ = "control" if control else "worse" if delta.value > 0 else "better"
    drawn = svg.bar(scale, _perplexity(start), _perplexity(start + delta.value), class_)
    if delta.interval:
        low, high = delta.interval
        drawn += svg.whisker(scale, _perplexity(start + low), _perplexity(start + high))
    return drawn


def losses(s: SetWithGates) -> Chart:
    """Loss of each variant against the reference, on a scale of its own.

    Controls outside of the scale are drawn at its edge.
    """
    edges = [(e, p) for e in s["edges"] if e["from"] == s["reference"] and (p := point(e["loss_percent"]))]
    near = [p for e, p in edges if e["kind"] not in ("control", "road")]
    if not near:
        return Chart(caption="", rows=())
    limits = [g["limit"] for g in s["gates"] if g["metric"] == "ppl_increase" and g["relative_to"] is None]
    scale = Scale.around([0.0, *(x for p in near for x in p.numbers), *limits])
    behind = svg.grid(scale) + svg.upright(scale, 0, "zero")
    behind += Markup("").join(svg.upright(scale, limit, "limit") for limit in limits)
    rows = []
    for e, loss in edges:
        text = format_estimate(e["loss_percent"], signed=True, unit=" %")
        if loss.value > scale.high or loss.value < scale.low:
            shape = svg.element("text", "off the scale ->", x="100%", y=17, text_anchor="end")
        else:
            shape = svg.dot(scale, loss.value, "level")
            if loss.interval:
                shape = svg.whisker(scale, *loss.interval) + shape
        drawn = behind + svg.mark(shape, f"{e['to']} against {s['reference']}: perplexity {text}")
        rows.append(Row(label=e["to"], drawing=drawn, value=text))
    caption = (
        f"The loss against {s['reference']} enlarged: point and 95 % interval; an interval that touches the zero line"
    )
    caption += " is no proven loss." + (" Dashed: the gate's limit." if limits else "")
    return Chart(caption=caption, rows=tuple(rows), axis=svg.axis(scale, " %"), unit="change of perplexity")


def ladder(s: EvaluationSet) -> Chart:
    """Quantiles of the tokens' KL on a logarithmic axis."""
    ladders = [(e["to"], kl) for e in s["edges"] if (kl := e["kl"]) is not None]
    known = [kl[k] for _, kl in ladders for k, _ in QUANTILES if kl[k]]
    if not known:
        return Chart(caption="", rows=())
    scale = Scale.around(known, log=True)
    rows = []
    for variant, kl in ladders:
        drawn = svg.grid(scale)
        steps = [(key, name, kl[key]) for key, name in QUANTILES if kl[key] is not None]
        if steps:
            drawn += svg.bar(scale, max(steps[0][2], scale.low), max(steps[-1][2], scale.low), "span", y=12, height=2)
        for number, (key, name, value) in enumerate(steps):
            radius = 6 - 0.7 * number
            shape = svg.dot(scale, value, "level" if key == "median" else "open", radius=radius)
            drawn += svg.mark(shape, f"{variant}: {name} {format_value(value)} nats")
        rows.append(Row(label=variant, drawing=drawn, value=f"p99 {format_value(kl['p99'])}"))
    caption = f"How far each token's prediction moved from {s['reference']}'s, KL: from left to right the median"
    caption += " (filled), then p90, p95, p99, p99.9 and the largest, ever smaller."
    return Chart(caption=caption, rows=tuple(rows), axis=svg.axis(scale), unit="nats per token, log scale")


def flips(s: EvaluationSet) -> Chart:
    """Tokens that turned wrong (bars to the left) and right (bars to the right), by step."""
    edges = [(e, tuple(p for key, *_ in FLIPS if (p := point(e[key])))) for e, _ in _steps(s)]
    edges = [(e, points) for e, points in edges if len(points) == len(FLIPS)]
    if not edges:
        return Chart(caption="", rows=())
    reach = max(100 * p.numbers[-1] for _, points in edges for p in points)
    scale = Scale.around([-reach, reach]) if reach else Scale(-1, 1)
    rows = []
    for e, points in edges:
        drawn, texts = svg.grid(scale) + svg.upright(scale, 0, "zero"), []
        for (key, sign, class_, words), share in zip(FLIPS, points, strict=True):
            shape = svg.bar(scale, 0, 100 * sign * share.value, class_)
            if share.interval:
                low, high = sorted(100 * sign * end for end in share.interval)
                shape += svg.whisker(scale, low, high)
            texts.append(format_estimate(e[key], factor=100, unit=" %", interval=False))
            full = format_estimate(e[key], factor=100, unit=" %")
            drawn += svg.mark(shape, f"{e['from']} -> {e['to']}: {words} {full}")
        rows.append(Row(label=f"{e['from']} -> {e['to']}", drawing=drawn, value=" | ".join(texts)))
    caption = (
        "Tokens whose most likely prediction turned wrong (left) or right (right) at each step, with 95 % intervals."
    )
    legend = (("worse", "right -> wrong"), ("better", "wrong -> right"))
    return Chart(
        caption=caption, rows=tuple(rows), axis=svg.axis(scale, " %"), unit="of the scored tokens", legend=legend
    )


def tails(s: EvaluationSet) -> list[Chart]:
    """Loss by tenth of the tokens, a chart for each variant.

    The control has one only where no other variant was scored.
    """
    found = s["tails"]
    if found is None:
        return []
    names = [name for name in found["variants"] if name not in ("merged", "original")]
    against = f"nats a token against {s['reference']}"
    return [_tails(found, name, against) for name in names if name not in BESIDE or len(names) == 1]


def _tails(found: Tails, name: str, unit: str) -> Chart:
    groups, losses = found["groups"], found["variants"][name]["loss"]
    points = [point(loss) for loss in losses]
    scale = Scale.around([0.0, *(x for p in points if p for x in p.numbers)])
    rows = []
    for number, (group, loss, p) in enumerate(zip(groups, losses, points, strict=True), 1):
        text = format_estimate(loss, signed=True)
        shape = svg.bar(scale, 0, p.value, "worse" if p.value > 0 else "better") if p else Markup()
        if p and p.interval:
            shape += svg.whisker(scale, *p.interval)
        label = f"{number} of {len(groups)}"
        said = f"{name}, tokens {label}, ln p changed by {group['low']:.3g} to {group['high']:.3g}: {text} nats a token"
        drawn = svg.grid(scale) + svg.upright(scale, 0, "zero") + svg.mark(shape, said)
        rows.append(Row(label=label, drawing=drawn, value=text))
    caption = f"{name}: loss of the tokens by how much the adapter had changed them, least changed first. Long bars at"
    caption += " the end are learned behaviour that was lost, equal bars are general noise."
    return Chart(caption=caption, rows=tuple(rows), axis=svg.axis(scale), unit=unit)


def healing(facts: HealFacts) -> Chart:
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
    caption = "Healing: distance from its teacher on held-out text by step, higher is farther; the filled point is what"
    caption += " was kept."
    return Chart(caption=caption, rows=(row,), axis=svg.axis(across), unit="steps")


def _ppl(s: EvaluationSet, name: str) -> str:
    """Of a variant; empty for what was not scored on the whole set."""
    return next((format_estimate(v["ppl"], interval=False) for v in s["variants"] if v["name"] == name), "")
