"""Scores and facts in, the `report.json` dict out. Every rendering reads that dict and nothing else.

The dict holds no NaN: what is unknown is null, what is not defined (retention where the adapter gains
nothing) too.

`facts` passes through whole. What the renderings look for, each key optional:

    name, created: str    recipe: YAML text    base, adapter: name, or {"name": ...}    warnings: [str]
    merge:       {"dtype", "why", "ledger": {kind: count}, "selftest": ...}
    quantize:    {"settings": {"bits", "group_size", ...}, "bits_per_weight": float, "modules": [{"name",
    "bits",
                 "group_size", "loss", "relative_error", "rtn_error", "damp", "fallback", ...}]}
    calibration: {..., "overlap": {set name: share of its 13-grams}}
    cost:        {"bytes": {artifact: int}, "seconds": {stage: float}, "peak_rss": {stage: bytes}}
    versions, hardware: {name: text}
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from requant_eval import statistics as st
from requant_eval.errors import EvaluationError
from requant_eval.headline import headline
from requant_eval.tokens import TokenScores

if TYPE_CHECKING:
    from requant_eval.windows import EvalSet

SCHEMA_VERSION = 1
OVERLAP_LIMIT = 0.01
REFERENCES = ("adapter", "merged")
# (from, to, kind): the way from the base to what ships, then the controls.
EDGES = (
    ("base", "adapter", "learned"),
    ("adapter", "merged", "merge"),
    ("merged", "gptq", "quantize"),
    ("gptq", "healed", "heal"),
    ("adapter", "gptq", "total"),
    ("adapter", "healed", "total"),
    ("merged", "rtn", "control"),
    ("adapter", "rtn", "control"),
    ("adapter", "original", "fork"),
)


@dataclass(frozen=True)
class SetResult:
    """The facts of one evaluation set (see `EvalSet`) and the scores of every variant on it."""

    name: str
    digest: str
    protocol: str
    window: int
    bos: bool
    n_documents: int
    n_scored: int
    n_bytes: int
    dropped: int
    scores: Mapping[str, TokenScores]

    @classmethod
    def of(cls, eval_set: EvalSet, scores: Mapping[str, TokenScores]) -> SetResult:
        """From the set that was scored."""
        return cls(
            name=eval_set.name,
            digest=eval_set.digest,
            protocol=eval_set.protocol,
            window=eval_set.window,
            bos=eval_set.bos,
            n_documents=eval_set.n_documents,
            n_scored=eval_set.n_scored,
            n_bytes=eval_set.n_bytes,
            dropped=eval_set.dropped,
            scores=scores,
        )


def build(*, sets: Sequence[SetResult], facts: Mapping[str, Any], in_domain: str | None = None) -> dict[str, Any]:
    """The report. KL and agreement of every variant are against `adapter`, or `merged` where that was not
    scored.

    in_domain: name of the set on which retention is computed; default: the first.

    Raises:
        EvaluationError: no set, or variants of a set scored on different tokens.
    """
    if not sets:
        raise EvaluationError("no evaluation set was scored: nothing to report")
    home = in_domain or sets[0].name
    rendered = [_set(s, in_domain=s.name == home) for s in sets]
    report: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": facts.get("name"),
        "created": facts.get("created"),
        "headline": "",
        "sets": rendered,
        "facts": dict(facts),
        "warnings": [*(facts.get("warnings") or []), *_warnings(rendered, facts)],
    }
    cleaned: dict[str, Any] = plain(report)
    cleaned["headline"] = headline(cleaned)
    return cleaned


def dumps(report: Mapping[str, Any]) -> str:
    """The report as JSON text; raises ValueError rather than write NaN or Infinity."""
    return json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def fingerprint(result: SetResult) -> str:
    """Eight hex digits of protocol and tokens: numbers with the same fingerprint may be compared."""
    text = f"{result.protocol}|{result.window}|{int(result.bos)}|{result.digest}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]


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


def _set(result: SetResult, *, in_domain: bool) -> dict[str, Any]:
    _check(result)
    sums = {name: st.sums(s.nll, s.document) for name, s in result.scores.items()}
    reference = next((name for name in REFERENCES if name in sums), None)
    facts = {key: value for key, value in vars(result).items() if key != "scores"}
    return facts | {
        "in_domain": in_domain,
        "fingerprint": fingerprint(result),
        "few_documents": result.n_documents < st.FEW_DOCUMENTS,
        "reference": reference,
        "variants": [_variant(name, result, sums[name]) for name in sums],
        "edges": [_edge(result, sums, edge, reference) for edge in _edges(list(sums), reference)],
        "retention": _retention(sums) if in_domain else {},
        "documents": {name: {"n": s.n.astype(int), "nll": s.nll} for name, s in sums.items()},
    }


def _check(result: SetResult) -> None:
    if not result.scores:
        raise EvaluationError(f"set '{result.name}': no variant was scored")
    for name, scores in result.scores.items():
        if scores.digest != result.digest:
            raise EvaluationError(
                f"set '{result.name}': '{name}' was scored on {scores.digest[:12]}, the set is "
                f"{result.digest[:12]}: other tokens are never compared, score the variant again"
            )
        if scores.nonfinite:
            raise EvaluationError(f"set '{result.name}': '{name}' has {scores.nonfinite} NaN/inf tokens")


def _variant(name: str, result: SetResult, sums: st.Sums) -> dict[str, Any]:
    scores = result.scores[name]
    mean = st.mean_nll(sums)
    return {
        "name": name,
        "n": len(scores.nll),
        "mean_nll": asdict(mean),
        "ppl": asdict(mean.exp()),
        "bits_per_byte": asdict(st.bits_per_byte(sums, result.n_bytes)) if result.n_bytes else None,
        "top1_accuracy": asdict(st.share(scores.top1, scores.document)),
        "seconds": scores.seconds,
    }


def _edges(names: list[str], reference: str | None) -> list[tuple[str, str, str]]:
    edges = [edge for edge in EDGES if edge[0] in names and edge[1] in names]
    if reference is not None:
        reached = {end for start, end, _ in edges if start == reference} | {reference, "base"}
        edges += [(reference, name, "total") for name in names if name not in reached]
    return edges


def _edge(
    result: SetResult, sums: Mapping[str, st.Sums], edge: tuple[str, str, str], reference: str | None
) -> dict[str, Any]:
    start, end, kind = edge
    before, after = result.scores[start], result.scores[end]
    pair = st.paired(sums[end], sums[start])
    independent = st.naive_se(after.nll - before.nll)
    lost, won = st.flips(before.top1, after.top1, after.document)
    kl, agree = (after.kl, after.agree) if start == reference else (None, None)
    return {
        "from": start,
        "to": end,
        "kind": kind,
        "delta": asdict(pair.delta),
        "loss_percent": asdict(pair.loss_percent),
        "naive_se": independent,
        "design_effect": st.design_effect(pair.delta.se, independent),
        "kl": None if kl is None else asdict(st.divergence(kl, after.document)),
        "agreement": None if agree is None else asdict(st.share(agree, after.document)),
        "right_to_wrong": asdict(lost),
        "wrong_to_right": asdict(won),
    }


def _retention(sums: Mapping[str, st.Sums]) -> dict[str, Any]:
    """By variant; None = not defined. Empty unless both `base` and `adapter` were scored."""
    if "base" not in sums or "adapter" not in sums:
        return {}
    others = [name for name in sums if name not in ("base", "adapter")]
    kept = {name: st.retention(sums[name], base=sums["base"], adapter=sums["adapter"]) for name in others}
    return {name: None if estimate is None else asdict(estimate) for name, estimate in kept.items()}


def _warnings(sets: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> list[str]:
    found = []
    for s in sets:
        if s["few_documents"]:
            found.append(
                f"{s['name']}: only {s['n_documents']} documents; below {st.FEW_DOCUMENTS} "
                "intervals use Student's t and are rough"
            )
        found += [
            f"{s['name']}: '{e['to']}' scores exactly like '{e['from']}': was the same model measured twice?"
            for e in s["edges"]
            if e["kl"] is not None and e["kl"]["max"] == 0 and e["delta"]["value"] == 0
        ]
    overlap = (facts.get("calibration") or {}).get("overlap") or {}
    found += [
        f"{name}: {100 * value:.1f} % of its 13-grams are in the calibration data: its loss is understated"
        for name, value in overlap.items()
        if isinstance(value, int | float) and value > OVERLAP_LIMIT
    ]
    return found


def save(report: Mapping[str, Any], path: Path) -> None:
    """Writes `report.json` under a temporary name and renames it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(dumps(report), encoding="utf-8")
    temporary.replace(path)
