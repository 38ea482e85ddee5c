"""One task's section of the report: scores of its documents by variant in, estimates out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from requant_eval.metrics import proportions
from requant_eval.metrics.records import Estimate, scaled
from requant_eval.metrics.statistics import Floats
from requant_eval.metrics.task_records import TaskFacts, TaskSection, TaskStep, TaskVariant

REFERENCES = ("adapter", "merged")  # what others are compared with, the first that was run
ZERO: Estimate = {"value": 0.0, "se": 0.0, "low": 0.0, "high": 0.0}


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What a task gave. values: variant -> metric -> the value of each document, in one order."""

    facts: TaskFacts
    values: Mapping[str, Mapping[str, Sequence[float]]]
    seconds: Mapping[str, float]


def section(result: TaskResult) -> TaskSection:
    """The section of one task, of every variant that was run."""
    own = {name: _array(found[result.facts["metric"]]) for name, found in result.values.items()}
    reference = next((name for name in REFERENCES if name in own), None)
    shares = all(0 <= v <= 1 for values in own.values() for v in values)
    return {
        **result.facts,
        "scale": 100.0 if shares else 1.0,
        "reference": reference,
        "variants": [_variant(name, result) for name in own],
        "steps": [step(reference, name, own) for name in own if reference and name != reference],
        "documents": {name: values.tolist() for name, values in own.items()},
    }


def _variant(name: str, result: TaskResult) -> TaskVariant:
    found = {metric: proportions.score(_array(values)).record() for metric, values in result.values[name].items()}
    score = found.pop(result.facts["metric"])
    return {"name": name, "score": score, "others": found, "seconds": result.seconds[name]}


def step(before: str, after: str, values: Mapping[str, Floats]) -> TaskStep:
    """The paired difference from one name in `values` to another, and McNemar's test where it applies."""
    first, second = values[before], values[after]
    binary = proportions.is_binary(first) and proportions.is_binary(second)
    worse, better = proportions.changes(second, first) if binary else (None, None)
    return {
        "from": before,
        "to": after,
        "difference": proportions.difference(second, first).record(),
        "became_wrong": worse,
        "became_right": better,
        "p": None if worse is None or better is None else proportions.mcnemar(worse, better),
    }


def drop(s: TaskSection, variant: str | None) -> Estimate | None:
    """How far a variant fell below the reference, in the points that are shown; None where it was not compared."""
    if variant is not None and variant == s["reference"]:
        return ZERO.copy()
    found = next((t for t in s["steps"] if t["to"] == variant and t["from"] == s["reference"]), None)
    if found is None:
        return None
    points = scaled(found["difference"], s["scale"])
    return _negated(points) if s["higher_is_better"] else points


def without_variant(s: TaskSection, name: str) -> TaskSection:
    """The section without what belongs to one variant."""
    return {
        **s,
        "variants": [v for v in s["variants"] if v["name"] != name],
        "steps": [t for t in s["steps"] if name not in (t["from"], t["to"])],
        "missing": {v: why for v, why in s["missing"].items() if v != name},
        "documents": {v: values for v, values in s["documents"].items() if v != name},
    }


def _negated(estimate: Estimate) -> Estimate:
    turned = scaled(estimate, -1.0)
    return {"value": turned["value"], "se": estimate["se"], "low": turned["high"], "high": turned["low"]}


def _array(values: Sequence[float]) -> Floats:
    return np.asarray(values, np.float64)
