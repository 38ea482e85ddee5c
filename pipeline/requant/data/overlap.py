"""Overlap of evaluation text with calibration text: shared n-grams and shared documents."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from requant.data.documents import TokenDocument

NGRAM = 13


def overlap(calibration: Tensor, documents: Sequence[Sequence[int]], n: int = NGRAM) -> float:
    """Share of the documents' token n-grams that also occur in a calibration window.

    It is 0 without n-grams.
    """
    calibrated = {tuple(row[i : i + n]) for row in calibration.tolist() for i in range(len(row) - n + 1)}
    grams = [tuple(ids[i : i + n]) for ids in documents for i in range(len(ids) - n + 1)]
    return sum(g in calibrated for g in grams) / len(grams) if grams else 0.0


def shared_documents(calibration: Sequence[Sequence[TokenDocument]], documents: Sequence[TokenDocument]) -> float:
    """Share of `documents` that are whole documents of a calibration source.

    A document of a source counts whether or not a window uses it.
    """
    calibrated = {d.ids for source in calibration for d in source}
    return sum(d.ids in calibrated for d in documents) / max(len(documents), 1)
