"""Finding a metric's estimate in an evaluation set's section of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from requant_eval.metrics.records import Edge, Estimate, EvaluationSet, VariantResult

ROADS = ("nf4-merge", "nf4-again", "gptqmodel")  # variants that others would ship: no run deploys them
Of = Literal["variant", "step", "set"]


def step_from_reference(s: EvaluationSet, variant: str | None) -> Edge | None:
    """The step from the set's reference to a variant; None where the two were not compared."""
    return next((e for e in s["edges"] if e["from"] == s["reference"] and e["to"] == variant), None)


def find_estimate(s: EvaluationSet, variant: str, *, of: Of, key: str, part: str | None) -> Estimate | None:
    """A metric of one variant, in the report's unit; None where it was not measured or is not defined.

    of, key, part: its place, as `gate.Metric` declares it.
    """
    if of == "set":
        by_variant = cast("Mapping[str, Mapping[str, Estimate | None]]", s)[key]
        return by_variant.get(variant)
    row = step_from_reference(s, variant) if of == "step" else _row(s, variant)
    found = None if row is None else cast("Mapping[str, Any]", row).get(key)  # older reports lack some keys
    estimate: Estimate | None = found[part] if found and part else found
    return estimate


def _row(s: EvaluationSet, variant: str) -> VariantResult | None:
    return next((v for v in s["variants"] if v["name"] == variant), None)
