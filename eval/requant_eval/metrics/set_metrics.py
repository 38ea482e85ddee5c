"""An evaluation set's section of the report, computed from the scores of its variants.

Numbers may still be numpy's or NaN: `report.plain` makes them JSON.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from requant_eval.errors import EvaluationError
from requant_eval.metrics import records
from requant_eval.metrics import statistics as st
from requant_eval.metrics.definitions import DOCUMENT_SUMS, OF_STEP, Step
from requant_eval.metrics.loss_by_change import tails
from requant_eval.scoring.set_description import SetDescription
from requant_eval.scoring.token_scores import TokenScores

REFERENCES = ("adapter", "merged")
MIN_DOCUMENTS = 3
# (from, to, kind): the way from the base to what ships, then the controls.
EDGES: tuple[tuple[str, str, records.Kind], ...] = (
    ("base", "adapter", "learned"),
    ("adapter", "merged", "merge"),
    ("merged", "gptq", "quantize"),
    ("gptq", "healed", "heal"),
    ("gptq", "ends", "ends"),
    ("healed", "ends", "ends"),
    ("adapter", "gptq", "total"),
    ("adapter", "healed", "total"),
    ("adapter", "ends", "total"),
    ("merged", "rtn", "control"),
    ("adapter", "rtn", "control"),
    ("adapter", "original", "fork"),
    *(
        (start, end, "road")
        for start, end in (
            ("adapter", "nf4-merge"),
            ("merged", "nf4-again"),
            ("adapter", "nf4-again"),
            ("merged", "gptqmodel"),
            ("adapter", "gptqmodel"),
        )
    ),
)


@dataclass(frozen=True, kw_only=True)
class SetResult(SetDescription):
    """One evaluation set without its tokens, and the scores of every variant on it."""

    scores: Mapping[str, TokenScores]

    @classmethod
    def of(cls, scored: SetDescription, scores: Mapping[str, TokenScores]) -> SetResult:
        """From the set that was scored; its tokens are left behind."""
        described = {field.name: getattr(scored, field.name) for field in fields(SetDescription)}
        return cls(**described, scores=scores)


def section(result: SetResult, *, in_domain: bool) -> records.EvaluationSet:
    """One entry of the report's `sets`; document sums are still arrays, numbers may be NaN.

    Raises:
        EvaluationError: no variant, other tokens, NaN, or too few documents for an interval.
    """
    _check(result)
    sums = {name: st.sums(s.nll, s.document) for name, s in result.scores.items()}
    reference = next((name for name in REFERENCES if name in sums), None)
    return {
        "name": result.name,
        "digest": result.digest,
        "protocol": result.protocol,
        "window": result.window,
        "bos": result.bos,
        "n_documents": result.n_documents,
        "n_scored": result.n_scored,
        "n_bytes": result.n_bytes,
        "dropped": result.dropped,
        "in_domain": in_domain,
        "fingerprint": fingerprint(result),
        "few_documents": result.n_documents < st.FEW_DOCUMENTS,
        "reference": reference,
        "variants": [_variant(name, result, sums[name]) for name in sums],
        "edges": [_edge(result, sums, edge, reference) for edge in _edges(list(sums), reference)],
        "retention": _retention(sums) if in_domain else {},
        "tails": tails(result.scores),
        "documents": {name: _documents(s, result.scores, reference) for name, s in result.scores.items()},
    }


def _check(result: SetResult) -> None:
    if not result.scores:
        raise EvaluationError(f"set '{result.name}': no variant was scored")
    if result.n_documents < MIN_DOCUMENTS:
        raise EvaluationError(
            f"set '{result.name}' has {result.n_documents} documents: an interval needs at least {MIN_DOCUMENTS}, "
            "and 20 or more to be worth much"
        )
    for name, scores in result.scores.items():
        if scores.digest != result.digest:
            raise EvaluationError(
                f"set '{result.name}': '{name}' was scored on {scores.digest[:12]}, the set is "
                f"{result.digest[:12]}: other tokens are never compared, score the variant again"
            )
        if scores.nonfinite:
            raise EvaluationError(f"set '{result.name}': '{name}' has {scores.nonfinite} NaN/inf tokens")


def _variant(name: str, result: SetResult, sums: st.Sums) -> records.VariantResult:
    scores = result.scores[name]
    mean = st.mean_nll(sums)
    return {
        "name": name,
        "n": len(scores.nll),
        "mean_nll": mean.record(),
        "ppl": mean.exp().record(),
        "bits_per_byte": st.bits_per_byte(sums, result.n_bytes).record() if result.n_bytes else None,
        "top1_accuracy": st.share(scores.top1, scores.document).record(),
        "seconds": scores.seconds,
    }


def _edges(names: list[str], reference: str | None) -> list[tuple[str, str, records.Kind]]:
    edges = [edge for edge in EDGES if edge[0] in names and edge[1] in names]
    if "healed" in names:  # whose embeddings and head are rounded then
        edges = [edge for edge in edges if edge[:2] != ("gptq", "ends")]
    if reference is not None:
        reached = {end for start, end, _ in edges if start == reference} | {reference, "base"}
        edges += [(reference, name, "total") for name in names if name not in reached]
    return edges


def _edge(
    result: SetResult, sums: Mapping[str, st.Sums], edge: tuple[str, str, records.Kind], reference: str | None
) -> records.Edge:
    start, end, kind = edge
    before, after = result.scores[start], result.scores[end]
    pair = st.paired(sums[end], sums[start])
    independent = st.naive_se(after.nll - before.nll)
    step = Step(before=before, after=after, paired=pair, from_reference=start == reference)
    computed = {key: of(step) for key, of in OF_STEP.items()}
    shown = {key: None if value is None else value.record() for key, value in computed.items()}
    row: dict[str, Any] = {
        "from": start,
        "to": end,
        "kind": kind,
        "delta": pair.delta.record(),
        "loss_percent": shown.pop("loss_percent"),
        "naive_se": independent,
        "design_effect": st.design_effect(pair.delta.se, independent),
    }
    return cast("records.Edge", row | shown)  # metrics that `Edge` does not list have keys of their own


def _retention(sums: Mapping[str, st.Sums]) -> dict[str, records.Estimate | None]:
    """By variant; None = not defined. Empty unless both `base` and `adapter` were scored."""
    if "base" not in sums or "adapter" not in sums:
        return {}
    others = [name for name in sums if name not in ("base", "adapter")]
    kept = {name: st.retention(sums[name], base=sums["base"], adapter=sums["adapter"]) for name in others}
    return {name: None if estimate is None else estimate.record() for name, estimate in kept.items()}


def _documents(scores: TokenScores, others: Mapping[str, TokenScores], reference: str | None) -> records.Documents:
    """Sums over each document; `report.compare` pairs the variants of two runs with them."""
    before = None if reference is None else others[reference]
    sums = {key: of(scores, before) for key, of in DOCUMENT_SUMS.items()}
    return cast("records.Documents", {key: column for key, column in sums.items() if column is not None})


def fingerprint(result: SetResult) -> str:
    """Eight hex digits of protocol and tokens.

    Numbers with the same fingerprint may be compared.
    """
    text = f"{result.protocol}|{result.window}|{int(result.bos)}|{result.digest}"
    return hashlib.sha256(text.encode()).hexdigest()[:8]
