"""Loss of a variant by how much the adapter changed each token.

Scored tokens are sorted by |ln p_adapter - ln p_base| into ten groups of equal size. Lost learned behaviour is a loss
in the last groups and `reverted` > 0. Noise is the same loss in all groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from requant_eval.metrics import records
from requant_eval.metrics import statistics as st
from requant_eval.scoring.token_scores import TokenScores

GROUPS = 10


def tails(scores: Mapping[str, TokenScores]) -> records.Tails | None:
    """Groups of tokens of one evaluation set, and every variant's loss on them.

    None unless base and adapter were scored.
    groups: number of tokens and range of |ln p_adapter - ln p_base| (nats) of each, least changed first.
    variants: by name, for each:
    reverted: the share of the adapter's change of each token that the variant took back (see `reverted`).
    last_share: the last group's share of the whole loss; None unless the loss is significant.
    loss: nats a token against the adapter, one clustered estimate a group.
    kl, disagreement: the same of KL and of another top-1 prediction; None without a reference.
    """
    if "base" not in scores or "adapter" not in scores:
        return None
    base, adapter = scores["base"], scores["adapter"]
    change = base.nll - adapter.nll
    groups = deciles(np.abs(change))
    size = np.abs(change)
    others = {name: s for name, s in scores.items() if name not in ("base", "adapter")}
    return {
        "groups": [
            {"n": int(at.sum()), "low": float(size[at].min()), "high": float(size[at].max())}
            for at in (groups == g for g in range(GROUPS))
            if at.any()
        ],
        "variants": {name: _variant(s, adapter, change, groups) for name, s in others.items()},
    }


def deciles(size: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """The group 0..9 of each of n values by rank: int64 [n].

    Groups have equal sizes; equal values keep their order.
    """
    rank = np.empty(len(size), dtype=np.int64)
    rank[np.argsort(size, kind="stable")] = np.arange(len(size))
    out: npt.NDArray[np.int64] = rank * GROUPS // max(1, len(size))
    return out


def reverted(
    lost: npt.NDArray[np.float64], change: npt.NDArray[np.float64], document: npt.NDArray[np.int32]
) -> st.Estimate | None:
    """Least-squares slope through 0 of `lost` (x_V - x_A) on `change` (x_B - x_A).

    lost, change: nats per token [n]. 0: what the variant changes does not depend on what the adapter changed. 1: the
    variant is the base again. None if the adapter changed nothing.
    """
    square = st.document_sums(change * change, document)
    if not square.sum() > 0:
        return None
    return st.ratio(st.document_sums(lost * change, document), square)


def _variant(
    scores: TokenScores, adapter: TokenScores, change: npt.NDArray[np.float64], groups: npt.NDArray[np.int64]
) -> records.VariantTails:
    lost = scores.nll - adapter.nll
    slope = reverted(lost, change, scores.document)
    different = None if scores.agree is None else ~scores.agree
    return {
        "reverted": None if slope is None else slope.record(),
        "last_share": _last_share(lost, scores.document, groups),
        "loss": _by_group(lost, scores.document, groups),
        "kl": None if scores.kl is None else _by_group(scores.kl, scores.document, groups),
        "disagreement": None if different is None else _by_group(different, scores.document, groups),
    }


def _last_share(
    lost: npt.NDArray[np.float64], document: npt.NDArray[np.int32], groups: npt.NDArray[np.int64]
) -> records.Estimate | None:
    if not st.mean(lost, document).low > 0:
        return None
    last = np.where(groups == groups.max(), lost, 0.0)
    return st.ratio(st.document_sums(last, document), st.document_sums(lost, document)).record()


def _by_group(
    values: npt.NDArray[Any], document: npt.NDArray[np.int32], groups: npt.NDArray[np.int64]
) -> list[records.Estimate]:
    """Mean of the values of each group, clustered by the documents that have a token in it."""
    count = int(document.max()) + 1
    found = []
    for group in range(GROUPS):
        at = groups == group
        if not at.any():
            continue
        n = np.bincount(document[at], minlength=count).astype(np.float64)
        total = np.bincount(document[at], weights=values[at], minlength=count).astype(np.float64)
        found.append(st.ratio(total[n > 0], n[n > 0]).record())
    return found
