"""How much evaluation text also occurs in calibration text: shared n-grams, shared documents."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from requant.data.documents import Tokens

NGRAM = 13


def overlap(calibration: Tensor, documents: Sequence[Sequence[int]], n: int = NGRAM) -> float:
    """Share of the documents' token n-grams that also occur in a calibration window (0 when there are none)."""
    known = {tuple(row[i : i + n]) for row in calibration.tolist() for i in range(len(row) - n + 1)}
    grams = [tuple(ids[i : i + n]) for ids in documents for i in range(len(ids) - n + 1)]
    return sum(g in known for g in grams) / len(grams) if grams else 0.0


def shared_documents(calibration: Sequence[Sequence[Tokens]], documents: Sequence[Tokens]) -> float:
    """Share of `documents` that stand whole in a calibration source, drawn into a window or not."""
    known = {d.ids for source in calibration for d in source}
    return sum(d.ids in known for d in documents) / max(len(documents), 1)
