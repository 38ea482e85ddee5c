"""What the adapter gained over its base: the ground that retention stands on."""

from __future__ import annotations

from collections.abc import Mapping

from requant_eval.metrics.facts import known_facts
from requant_eval.metrics.records import Edge, EvaluationSet
from requant_eval.report.number_format import format_estimate, format_value
from requant_eval.report.records import Numbers

BEWARE = "Beware:"
WRONG_BASE = "the base that it was trained on, and its kind of text?"


def learned(s: EvaluationSet) -> Edge | None:
    """The step from the base to base and adapter, whose loss is negative where the adapter gains."""
    return next((e for e in s["edges"] if (e["from"], e["to"]) == ("base", "adapter")), None)


def gained_nothing(step: Edge) -> bool:
    """Whether the adapter's gain is zero or less, by the estimate."""
    return (step["delta"]["value"] or 0.0) >= 0


def in_words(step: Edge) -> str:
    """The gain in numbers."""
    return f"perplexity {format_estimate(step['loss_percent'], signed=True, unit=' %')} with it against without it"


def beware(report: Numbers) -> str:
    """A sentence for the first screen where the adapter makes its own text worse than its base; else an empty text.

    By the whole interval on the in-domain set; where the base was not scored there, by the loss on calibration text.
    """
    home = next((s for s in report["sets"] if s["in_domain"]), None)
    step = learned(home) if home is not None else None
    if home is None or step is None:
        said = _by_the_probe(report)
    elif (step["delta"]["low"] or 0.0) > 0:
        said = f"{home['name']}: {in_words(step)}"
    else:
        said = ""
    if not said:
        return ""
    return f"{BEWARE} the adapter makes its own text worse than its base alone does ({said}). Is this {WRONG_BASE}"


def _by_the_probe(report: Numbers) -> str:
    """The loss on the calibration text that the adapter serves best, where not even that one is lowered."""
    adapter = known_facts(report["facts"]).get("adapter")
    found = adapter.get("probe") if isinstance(adapter, Mapping) else None
    probes = [
        (str(p.get("source")), float(p["without"]), float(p["with_adapter"]))
        for p in (found if isinstance(found, list) else [])
        if isinstance(p, Mapping) and all(isinstance(p.get(k), float | int) for k in ("without", "with_adapter"))
    ]
    if not probes or any(tuned <= without for _, without, tuned in probes):
        return ""
    source, without, tuned = min(probes, key=lambda p: p[2] - p[1])
    return f"{source}: {format_value(without)} nats a token without it, {format_value(tuned)} with it"
