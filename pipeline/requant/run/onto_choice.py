"""The rule of `merge.onto: auto`: from the losses of both merges to the base that is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from requant.evaluate.merge_onto_probe import Onto
from requant.run.stage_results import OntoDecision, OntoFacts

if TYPE_CHECKING:
    from requant_eval.scoring.token_scores import TokenScores
    from requant_eval.scoring.windows import EvalSet


def facts_of(parts: Sequence[EvalSet], scores: Mapping[Onto, Sequence[TokenScores]]) -> list[OntoFacts]:
    """The losses of both merges on each set, and their difference paired by document."""
    from requant_eval.metrics import statistics

    found: list[OntoFacts] = []
    for i, s in enumerate(parts):
        sums = {onto: statistics.sums(many[i].nll, many[i].document) for onto, many in scores.items()}
        apart = statistics.paired(sums["original"], sums["dequantized"]).delta
        known = math.isfinite(apart.se)
        found.append(
            {
                "set": s.name,
                "documents": s.n_documents,
                "tokens": s.n_scored,
                "losses": {onto: statistics.mean_nll(own).value for onto, own in sums.items()},
                "difference": apart.value,
                "se": apart.se if known else None,
                "interval": (apart.low, apart.high) if known else None,
            }
        )
    return found


def decide(facts: Sequence[OntoFacts]) -> OntoDecision:
    """The base to merge onto: the original where its mean loss over the sets is surely lower, else what training saw.

    Each set counts equally, so that fine-tune and general text do. Surely: the 95 % interval is below zero. Sets with
    one document have no interval and do not count.
    """
    found = _mean([(f["difference"], f["se"], f["documents"] - 1) for f in facts if f["se"] is not None])
    if found is None:
        return _decided("dequantized", "no set has two documents, so nothing can be told", None, facts)
    value, low, high = found
    size, between = f"{abs(value):.4f} nats a token", f"(95 %: {low:+.4f} to {high:+.4f})"
    if high < 0:
        return _decided("original", f"its held-out loss is {size} lower {between}", found, facts)
    if low > 0:
        return _decided("dequantized", f"its held-out loss is {size} lower {between}", found, facts)
    return _decided("dequantized", f"the held-out losses cannot be told apart, {size} {between}", found, facts)


def _mean(many: Sequence[tuple[float, float, int]]) -> tuple[float, float, float] | None:
    """(mean, low, high) of independent (value, standard error, degrees of freedom); None of none.

    Degrees of freedom of the mean by Welch and Satterthwaite.
    """
    from requant_eval.metrics.statistics import LEVEL, t_quantile

    if not many:
        return None
    value, variance = sum(v for v, _, _ in many) / len(many), sum(se**2 for _, se, _ in many)
    if variance == 0:
        return value, value, value
    freedom = variance**2 / sum(se**4 / df for _, se, df in many)
    half = t_quantile(0.5 + LEVEL / 2, max(1, int(freedom))) * math.sqrt(variance) / len(many)
    return value, value - half, value + half


def _decided(onto: Onto, why: str, mean: tuple[float, float, float] | None, facts: Sequence[OntoFacts]) -> OntoDecision:
    """With a word on sets that surely say the opposite of what was decided."""
    sign = 1 if onto == "original" else -1
    against = [f["set"] for f in facts if f["interval"] and min(sign * end for end in f["interval"]) > 0]
    if against:
        why += f"; on {', '.join(against)} alone the other merge is surely better"
    value, ends = (mean[0], mean[1:]) if mean else (None, None)
    return {"onto": onto, "why": why, "difference": value, "interval": ends, "sets": list(facts)}
