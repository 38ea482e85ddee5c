"""`report.json` from scores and facts; every rendering reads that dict and nothing else.

The dict has no NaN: numbers that are unknown or not defined (retention where the adapter gains nothing) are null.

`facts` is kept whole. Keys that the renderings read, all optional:

    name, created: str    recipe: YAML text    base, adapter: name, or {"name": ...}    warnings: [str]
    merge:       {"dtype", "why", "ledger": {kind: count}, "selftest": ...}
    quantize:    {"settings": {"bits", "group_size", ...}, "bits_per_weight": float, "modules": [{"name", "bits",
                 "group_size", "loss", "relative_error", "rtn_error", "damp", "fallback", "signal",
                 "signal_to_noise", "retention", "output_retention", "delta_norm", ...}],
                 "resonance": {"retention": estimate, "modules": int, "blocks": [text], "relative_delta": float}}
    canaries:    what `scoring.canaries.result` returns
    suggestion:  {"units": [...], "patch": YAML text, "before": {"kl": estimate}, "sample": {"tokens": int}}
    calibration: {..., "overlap": {set name: share of its 13-grams}}
    cost:        {"bytes": {artifact: int}, "seconds": {stage: float}, "peak_rss": {stage: bytes}}
    verify:      the result of verifying gptq; heal.verify: the same of healed
    versions, hardware: {name: text}
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from requant_eval.errors import EvaluationError
from requant_eval.gate import Gate
from requant_eval.metrics import engine_step
from requant_eval.metrics import statistics as st
from requant_eval.metrics.records import EvaluationSet
from requant_eval.metrics.set_metrics import SetResult, fingerprint, section
from requant_eval.report.headline import headline
from requant_eval.report.recommend import recommend
from requant_eval.report.verdict import judge, verdict

__all__ = ["SCHEMA_VERSION", "SetResult", "build", "conclude", "dumps", "fingerprint", "plain", "save", "save_text"]

SCHEMA_VERSION = 2  # 1: no gates, verdict, recommendation and tails; document sums of n and nll alone
OVERLAP_LIMIT = 0.01
NUMBERS = re.compile(r"\[\n[-+.,\deE\s]*\]")  # in JSON a line break is never inside a string


def build(
    *,
    sets: Sequence[SetResult],
    facts: Mapping[str, Any],
    in_domain: str | None = None,
    gates: Sequence[Gate] = (),
) -> dict[str, Any]:
    """The report as a dict of JSON types.

    KL and agreement of every variant are against `adapter`, or `merged` where `adapter` was not scored.
    in_domain: name of the set on which retention is computed; default: the first. gates: what the verdict is made of.

    Raises:
        EvaluationError: no set, variants of a set scored on different tokens, a gate on a set that is not there.
    """
    if not sets:
        raise EvaluationError("no evaluation set was scored: nothing to report")
    home = in_domain or sets[0].name
    rendered: list[EvaluationSet] = [
        {**section(s, in_domain=s.name == home), "kernels": engine_step.steps(facts, s.name, s.digest)} for s in sets
    ]
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": facts.get("name"),
        "created": facts.get("created"),
        "verdict": {},
        "headline": "",
        "gates": [],
        "recommendation": {},
        "sets": rendered,
        "facts": dict(facts),
        "warnings": [*(facts.get("warnings") or []), *_warnings(rendered, facts)],
    }
    cleaned: dict[str, Any] = plain(report)
    return conclude(cleaned, gates)


def conclude(report: dict[str, Any], gates: Sequence[Gate]) -> dict[str, Any]:
    """The report with headline, gates, verdict and recommendation, computed from its numbers."""
    judged = judge(report, gates)
    drawn = {
        "headline": headline(report),
        "gates": judged,
        "verdict": verdict(report, judged),
        "recommendation": recommend(report, gates),
    }
    return report | {key: plain(value) for key, value in drawn.items()}


def dumps(report: Mapping[str, Any]) -> str:
    """The report as JSON text, each list of numbers on one line.

    Raises:
        ValueError: NaN or infinity in the report.
    """
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    return NUMBERS.sub(lambda match: " ".join(match[0].split()), text) + "\n"


def plain(value: Any) -> Any:
    """JSON types only: numpy, tuples, sets and paths converted, NaN and infinity to None."""
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return str(value)


def _warnings(sets: Sequence[EvaluationSet], facts: Mapping[str, Any]) -> list[str]:
    found = []
    for s in sets:
        if s["few_documents"]:
            found.append(
                f"{s['name']}: only {s['n_documents']} documents; below {st.FEW_DOCUMENTS} "
                "intervals are wide and only roughly 95 % ones"
            )
        found += [
            f"{s['name']}: '{e['to']}' scores exactly like '{e['from']}': was the same model measured twice?"
            for e in s["edges"]
            if e["kl"] is not None and e["kl"]["max"] == 0 and e["delta"]["value"] == 0
        ]
        found += [
            f"{s['name']}: healing made it worse, ln perplexity {e['delta']['value']:+.4f}: heal on more such text"
            for e in s["edges"]
            if e["kind"] == "heal" and (e["delta"]["low"] or 0) > 0
        ]
    overlap = (facts.get("calibration") or {}).get("overlap") or {}
    found += [
        f"{name}: {100 * value:.1f} % of its 13-grams are in the calibration data: its loss is understated"
        for name, value in overlap.items()
        if isinstance(value, int | float) and value > OVERLAP_LIMIT
    ]
    return found


def save(report: Mapping[str, Any], path: Path) -> None:
    """Writes `report.json`, whole or not at all."""
    save_text(path, dumps(report))


def save_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
