"""Overlap of evaluation text with calibration text: shared n-grams and shared documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from requant.data.documents import TokenDocument

NGRAM = 13
FEW = 4  # documents from which text that most of them hold counts as common


def overlap(
    calibration: Tensor, windows: Sequence[Sequence[int]], document_of: Sequence[int] | None = None, n: int = NGRAM
) -> float:
    """Share of the windows' token n-grams that also occur in a calibration window.

    What more than half of the documents hold, such as a system prompt, does not count: it says nothing about a
    document. document_of: the document of each window; None: each is one. It is 0 without n-grams.
    """
    calibrated = {tuple(row[i : i + n]) for row in calibration.tolist() for i in range(len(row) - n + 1)}
    grams = [tuple(ids[i : i + n]) for ids in windows for i in range(len(ids) - n + 1)]
    common = _common(windows, range(len(windows)) if document_of is None else document_of, n)
    own = [g for g in grams if g not in common] or grams  # documents that are all alike are their own text
    return sum(g in calibrated for g in own) / len(own) if own else 0.0


def _common(windows: Sequence[Sequence[int]], document_of: Sequence[int], n: int) -> set[tuple[int, ...]]:
    """The n-grams that more than half of the documents hold."""
    documents: dict[int, set[tuple[int, ...]]] = {}
    for ids, document in zip(windows, document_of, strict=True):
        documents.setdefault(document, set()).update(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
    if len(documents) < FEW:
        return set()
    holders = Counter(g for own in documents.values() for g in own)
    return {g for g, count in holders.items() if 2 * count > len(documents)}


def shared_documents(calibration: Sequence[Sequence[TokenDocument]], documents: Sequence[TokenDocument]) -> float:
    """Share of `documents` that are whole documents of a calibration source.

    A document of a source counts whether or not a window uses it.
    """
    calibrated = {d.ids for source in calibration for d in source}
    return sum(d.ids in calibrated for d in documents) / max(len(documents), 1)
