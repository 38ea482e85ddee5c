"""The step from our decoding of a checkpoint to a serving engine, paired by document.

What differs is the rounding of the engine's kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from requant_eval.errors import EvaluationError
from requant_eval.metrics import records
from requant_eval.metrics import statistics as st
from requant_eval.metrics.facts import Facts, ProofFacts


def step(
    engine: Sequence[Sequence[float]], decoded: Sequence[Sequence[float]], documents: Sequence[int]
) -> records.PairedLoss:
    """Loss of an engine against our decoding of the same checkpoint on the same tokens.

    engine, decoded: -ln p of every scored token, nats, row by row. documents: the document of each row, 0..G-1.
    Returns "delta", "loss_percent", "n_documents" and "n_tokens"; a number that is NaN or infinite becomes None.

    Raises:
        EvaluationError: the two did not score the same tokens.
    """
    lengths = [len(row) for row in decoded]
    if [len(row) for row in engine] != lengths or len(documents) != len(lengths):
        raise EvaluationError("an engine scored other tokens than our decoding: the two cannot be paired")
    document = np.repeat(np.asarray(documents, np.int32), lengths)
    sums = [st.sums(np.asarray([x for row in rows for x in row], np.float64), document) for rows in (engine, decoded)]
    with np.errstate(invalid="ignore", over="ignore"):
        pair = st.paired(*sums)
    return {
        "delta": _known(pair.delta),
        "loss_percent": _known(pair.loss_percent),
        "n_documents": pair.n_documents,
        "n_tokens": len(document),
    }


def _known(estimate: st.Estimate) -> records.Estimate:
    found = estimate.record()
    for part in records.FIELDS:
        value = found[part]
        found[part] = value if value is not None and np.isfinite(value) else None
    return found


def proofs(facts: Facts) -> list[tuple[str, ProofFacts]]:
    """(variant, result of verifying its checkpoint), in the order of the stages."""
    found = (("gptq", facts.get("verify")), ("healed", (facts.get("heal") or {}).get("verify")))
    return [(variant, proof) for variant, proof in found if proof]


def steps(facts: Facts, name: str, digest: str) -> list[records.KernelStep]:
    """The steps into engines, as far as they were measured on the evaluation set of this digest."""
    return [
        {
            "from": variant,
            "to": engine["engine"],
            "kind": "kernel",
            "delta": delta,
            "loss_percent": engine["loss_percent"],
            "n_documents": engine["n_documents"],
            "n_tokens": engine["n_tokens"],
            "dtype": engine["dtype"],
            "device": engine["device"],
        }
        for variant, proof in proofs(facts)
        if (proof.get("sample_set"), proof.get("sample_digest")) == (name, digest)
        for engine in proof.get("engines") or []
        if (delta := engine.get("delta")) and delta["value"] is not None
    ]


def speeds(facts: Facts) -> dict[str, dict[str, float]]:
    """variant -> engine -> tokens per second while decoding one sequence, where it was measured."""
    found = {
        variant: {e["engine"]: rate for e in proof.get("engines") or [] if (rate := e.get("tokens_per_second"))}
        for variant, proof in proofs(facts)
    }
    return {variant: speed for variant, speed in found.items() if speed}
