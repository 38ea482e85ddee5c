"""Gates judged on a report's intervals: pass, fail, inconclusive; and the verdict of all.

Non-inferiority: a gate passes when the whole 95 % interval is on the good side of its limit, fails when the whole
interval is on the bad side, and is inconclusive in between. Retention of an adapter that gained nothing is not defined
and never will be: its gate fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from requant_eval.errors import EvaluationError
from requant_eval.gate import METRICS, Gate, GateError, from_rule, is_counted
from requant_eval.metrics import answers, task_metrics
from requant_eval.metrics import statistics as st
from requant_eval.metrics.lookup import find_estimate, step_from_reference
from requant_eval.metrics.records import PARTS, Edge, Estimate, EvaluationSet, scaled
from requant_eval.report.adapter_gain import BEWARE, WRONG_BASE, beware, gained_nothing, in_words, learned
from requant_eval.report.headline import final_variant, method
from requant_eval.report.number_format import format_estimate
from requant_eval.report.records import GateResult, Numbers, Report, Status, Verdict

NOTHING_GAINED = "the adapter gained nothing"
HOPELESS = 1000  # times the documents there are: nobody collects that many


def saved_gates(report: Report) -> list[Gate]:
    """The gates that the report was made with.

    Raises:
        EvaluationError: a gate of a newer version.
    """
    try:
        return [from_rule(rule) for rule in report.get("gates") or ()]
    except GateError as error:
        raise EvaluationError(f"gates in the report: {error}: upgrade requant, or give the gates anew") from error


def judge(report: Numbers, gates: Sequence[Gate], variant: str | None = None) -> list[GateResult]:
    """Every gate with its estimate and status for `variant`; default: the variant that ships.

    Raises:
        EvaluationError: a gate names a set that the report doesn't have.
    """
    judged = variant or final_variant(report)
    return [_judge(report, gate, judged) for gate in gates]


def verdict(report: Numbers, judged: Sequence[GateResult]) -> Verdict:
    """One status for all gates, and a line that says it.

    status: "fail" if any gate fails, else "inconclusive" if any is, else "pass"; "none" without gates. The line also
    says where the adapter makes its own text worse, which no gate may be about.
    more_documents: the largest of the inconclusive gates.
    """
    doubt = f" {said}" if (said := beware(report)) else ""
    if doubt and any(NOTHING_GAINED in g["text"] for g in judged):  # the gate has the numbers
        doubt = f" {BEWARE} is this {WRONG_BASE}"
    if not judged:
        text = "No verdict: no gates are set (`gates:` in the recipe says how much loss is acceptable)."
        return {"status": "none", "line": text + doubt, "more_documents": None}
    found = [g["status"] for g in judged]
    status: Status = "fail" if "fail" in found else "inconclusive" if "inconclusive" in found else "pass"
    telling = [g for g in judged if g["status"] == status]
    more = [g["more_documents"] for g in telling if g["more_documents"]]
    count = "its gate" if len(judged) == 1 else f"{len(telling)} of {len(judged)} gates"
    what = {"pass": "keeps", "fail": "breaks", "inconclusive": "cannot be judged yet on"}[status]
    said = f"{status.upper()}: {method(report, str(judged[0]['variant']))} {what} {count}"
    if status == "pass" and len(judged) > 1:
        line = f"{said}; nearest to its limit: {min(telling, key=_margin)['text']}."
    else:
        line = f"{said}: {'; '.join(g['text'] for g in telling)}."
    return {"status": status, "line": line + doubt, "more_documents": max(more) if more else None}


def _margin(gate: GateResult) -> float:
    """Distance of a kept limit from the interval, in half intervals; infinite for width 0."""
    estimate = gate["estimate"]
    if estimate is None:
        return math.inf
    end, value = estimate["high" if gate["side"] == "max" else "low"], estimate["value"]
    if end is None or value is None:
        return math.inf
    half = abs(end - value)
    return abs(gate["limit"] - end) / half if half > 0 else math.inf


def _judge(report: Numbers, gate: Gate, variant: str | None) -> GateResult:
    if METRICS[gate.metric].of == "task":
        return _judge_task(report, gate, variant)
    if METRICS[gate.metric].of == "answers":
        return _judge_answers(report, gate, variant)
    s = next((s for s in report["sets"] if s["name"] == gate.set), None)
    if s is None:
        known = ", ".join(str(s["name"]) for s in report["sets"])
        raise EvaluationError(f"gate '{gate.text}': the report has no set {gate.set!r}, only {known}")
    estimate, missing = _estimate(s, gate, variant)
    status, more = ("inconclusive", None) if estimate is None else _status(gate, estimate, s["n_documents"])
    if estimate is None and gate.metric == "retention" and (step := _unsure_gain(s, variant)) is not None:
        status, more, missing = _without_gain(step, s)
    return _result(gate, variant, estimate, status, more, missing)


def _judge_task(report: Numbers, gate: Gate, variant: str | None) -> GateResult:
    """A gate on how far a task's score may fall."""
    tasks = report.get("tasks") or []
    found = next((t for t in tasks if t["name"] == gate.set), None)
    if found is None:
        known = ", ".join(t["name"] for t in tasks) or "none"
        raise EvaluationError(f"gate '{gate.text}': the report has no task {gate.set!r}, only {known}")
    estimate = task_metrics.drop(found, variant)
    if estimate is not None:
        return _result(gate, variant, estimate, *_status(gate, estimate, found["n_documents"]), "")
    why = found["missing"].get(str(variant)) or ("it was not run" if found["reference"] else "nothing to compare with")
    return _result(gate, variant, None, "inconclusive", None, f"{variant or 'no quantized variant'}: {why}")


def _judge_answers(report: Numbers, gate: Gate, variant: str | None) -> GateResult:
    """A gate on how many answers may be lost: counted on these prompts, without an interval."""
    section = report.get("answers")
    if section is None or section["set"] != gate.set:
        raise EvaluationError(f"gate '{gate.text}': the report has no answers on {gate.set!r}")
    lost = answers.lost_rows(section, variant)
    if lost is None:
        why = section["why"] or "it was not asked, or there is nothing to compare with"
        return _result(gate, variant, None, "inconclusive", None, f"{variant or 'no quantized variant'}: {why}")
    count = float(len(lost))
    estimate: Estimate = {"value": count, "se": 0.0, "low": count, "high": count}
    return _result(gate, variant, estimate, "pass" if count <= gate.limit else "fail", None, "")


def _result(
    gate: Gate, variant: str | None, estimate: Estimate | None, status: Status, more: int | None, missing: str
) -> GateResult:
    """A gate's entry in the report. missing: why there is no estimate."""
    result: GateResult = {
        "metric": gate.metric,
        "set": gate.set,
        "limit": gate.limit,
        "relative_to": gate.relative_to,
        "side": gate.side,
        "unit": gate.unit,
        "variant": variant,
        "estimate": estimate,
        "status": status,
        "more_documents": more,
        "text": "",
    }
    result["text"] = _text(gate, result, missing)
    return result


def _status(gate: Gate, estimate: Estimate, documents: int) -> tuple[Status, int | None]:
    """The status; if inconclusive, how many more documents would decide in 80 % of samples."""
    value, low, high = (estimate[part] for part in PARTS)
    if value is None or low is None or high is None:
        return "inconclusive", None
    if gate.side == "min":
        value, low, high, limit = -value, -high, -low, -gate.limit
    else:
        limit = gate.limit
    if high <= limit:
        return "pass", None
    if low > limit:
        return "fail", None
    distance, half = abs(limit - value), high - value if value <= limit else value - low
    needed = st.documents_to_tell(distance, half, documents)
    return "inconclusive", max(1, math.ceil(needed - documents)) if needed < HOPELESS * documents else None


def _unsure_gain(s: EvaluationSet, variant: str | None) -> Edge | None:
    """The step from base to adapter, where it is why the retention of a variant is not defined."""
    return learned(s) if variant in s["retention"] and s["retention"][variant] is None else None


def _without_gain(step: Edge, s: EvaluationSet) -> tuple[Status, int | None, str]:
    """(status, more documents, why) of a gate on retention where the adapter did not surely gain.

    With a gain of zero or less it fails: more documents would not make it defined. With a gain that may be zero it is
    inconclusive, as other gates at their limit.
    """
    value, high, numbers = step["delta"]["value"], step["delta"]["high"], in_words(step)
    if value is None or gained_nothing(step):
        return "fail", None, f"not defined, since {NOTHING_GAINED} on {s['name']} ({numbers})"
    why = f"not defined yet, since the adapter's gain on {s['name']} cannot be told from zero ({numbers})"
    if high is None:
        return "inconclusive", None, why
    needed = st.documents_to_tell(-value, high - value, s["n_documents"])
    if needed >= HOPELESS * s["n_documents"]:
        return "inconclusive", None, f"{why}: no realistic number of documents would tell"
    more = max(1, math.ceil(needed - s["n_documents"]))
    return "inconclusive", more, f"{why}: about {more} more documents would tell"


def _estimate(s: EvaluationSet, gate: Gate, variant: str | None) -> tuple[Estimate | None, str]:
    """The metric of one variant on one set in the gate's unit, or None and the reason."""
    if variant is None or variant not in s["documents"]:
        return None, f"{variant or 'no quantized variant'} was not scored on {s['name']}"
    if gate.relative_to is not None:
        return _relative(s, gate.metric, variant, gate.relative_to)
    metric = METRICS[gate.metric]
    assert metric.of != "task", "judged by itself"
    assert metric.of != "answers", "judged by itself"
    found = find_estimate(s, variant, of=metric.of, key=metric.key, part=metric.part)
    if found is None:
        return None, _why_missing(s, gate.metric, variant)
    return scaled(found, metric.scale), ""


def _why_missing(s: EvaluationSet, metric: str, variant: str) -> str:
    """Why a set has no estimate of a metric of a variant that was scored on it."""
    of = METRICS[metric].of
    if of == "set":
        return f"{metric} is not defined on {s['name']}"
    if of == "step" and variant == s["reference"]:
        return f"{variant} is the reference itself"
    if of == "step" and step_from_reference(s, variant) is None:
        return f"{variant} was not compared with a reference on {s['name']}"
    return f"{metric} was not measured on {s['name']}"


def _relative(s: EvaluationSet, metric: str, variant: str, control: str) -> tuple[Estimate | None, str]:
    """The variant's loss in percent of the control's, paired by document."""
    if control not in s["documents"]:
        return None, f"{control} was not scored on {s['name']}"
    ours, theirs = (_losses(s, metric, name) for name in (variant, control))
    if ours is None or theirs is None:
        return None, f"{metric} was not measured on {s['name']}"
    if not st.ratio(theirs, np.asarray(s["documents"][control]["n"], np.float64)).low > 0:
        return None, f"{control} loses nothing measurable on {s['name']}: there is nothing to be relative to"
    return st.ratio(ours, theirs).scaled(100).record(), ""


def _losses(s: EvaluationSet, metric: str, variant: str) -> npt.NDArray[np.float64] | None:
    """Per-document sums of one metric of a variant, float64 [G]; None where it was not measured."""
    sums, reference = cast("Mapping[str, Mapping[str, Sequence[float]]]", s["documents"]), s["reference"]
    declared = METRICS[metric]
    if declared.column is None or reference is None:
        return None
    own = sums[variant].get(declared.column)
    if own is None:
        return None
    before = sums[reference][declared.column] if declared.from_reference else 0.0
    return np.asarray(own, np.float64) - np.asarray(before, np.float64)


def _text(gate: Gate, result: GateResult, missing: str) -> str:
    if result["estimate"] is None:
        return f"{gate.text}: {missing}"
    unit = f" {gate.unit}" if gate.unit else ""
    signed = METRICS[gate.metric].signed and gate.relative_to is None
    found = format_estimate(result["estimate"], signed=signed, unit=unit, interval=not is_counted(gate.metric))
    text = f"{gate.text}, measured {found}"
    if result["status"] != "inconclusive":
        return text
    if result["estimate"]["low"] is None:
        return f"{text}: too few documents for an interval"
    if result["more_documents"] is None:
        return f"{text}: at the limit, no realistic number of documents would tell"
    return f"{text}: about {result['more_documents']} more documents would tell"
