"""Documents that are the same text, or nearly: found by the runs of tokens that they share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from requant.data.overlap import FEW, NGRAM

NEARLY = 0.5  # share of its own runs that each of two documents has in common with the other
REACH = 8  # a run of tokens links each document that holds it with the next so many
RUNS = 2**21  # runs that are compared; of more text a sample, the same in every document


def same_text(documents: Sequence[Sequence[int]]) -> list[int]:
    """For each document (token ids) the number of the first one that is the same text; its own when none is.

    Two documents are the same when their ids are, or when each has at least `NEARLY` of its runs of 13 tokens in
    common with the other. As in `overlap`, runs that more than half of the different documents hold, such as a system
    prompt, say nothing of a document.
    """
    first: dict[tuple[int, ...], int] = {}
    same = [first.setdefault(tuple(ids), i) for i, ids in enumerate(documents)]
    different = list(first.values())
    for one, other in _near(_runs([documents[i] for i in different]), len(different)):
        low, high = sorted((_root(same, different[one]), _root(same, different[other])))
        same[high] = low
    return [_root(same, i) for i in range(len(documents))]


def _root(same: list[int], i: int) -> int:
    while same[i] != i:
        i = same[i]
    return i


def _runs(documents: Sequence[Sequence[int]]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """(hash of each different run of a document, the document's number), sorted by hash, then document."""
    factors = np.random.default_rng(0).integers(0, 2**63, NGRAM, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    every = max(1, sum(map(len, documents)) // RUNS)
    hashes, numbers = [], []
    for number, ids in enumerate(documents):
        if len(ids) < NGRAM:
            continue
        tokens = np.asarray(ids, dtype=np.uint64)
        count = len(ids) - NGRAM + 1
        run = sum((tokens[k : k + count] * factors[k] for k in range(NGRAM)), np.zeros(count, np.uint64))
        run = np.unique(run)
        run = run[(run >> np.uint64(32)) % np.uint64(every) == 0]
        hashes.append(run)
        numbers.append(np.full(len(run), number, np.int64))
    if not hashes:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    joined, owner = np.concatenate(hashes), np.concatenate(numbers)
    order = np.argsort(joined, kind="stable")
    return joined[order], owner[order]


def _near(runs: tuple[NDArray[np.uint64], NDArray[np.int64]], count: int) -> list[tuple[int, int]]:
    """Pairs of the `count` documents that have most of their runs in common."""
    hashes, owner = runs
    if count >= FEW and len(hashes):
        begins = np.flatnonzero(np.diff(hashes, prepend=~hashes[:1]))
        holders = np.diff(begins, append=len(hashes))
        kept = np.repeat(2 * holders <= count, holders)
        hashes, owner = hashes[kept], owner[kept]
    own = np.bincount(owner, minlength=count)
    pairs = [np.zeros(0, np.int64)]
    for reach in range(1, min(REACH, len(hashes) - 1) + 1):
        alike = hashes[reach:] == hashes[:-reach]
        pairs.append(owner[:-reach][alike] * count + owner[reach:][alike])
    found, shared = np.unique(np.concatenate(pairs), return_counts=True)
    one, other = found // max(count, 1), found % max(count, 1)
    near = shared >= NEARLY * np.maximum(own[one], own[other])
    return list(zip(one[near].tolist(), other[near].tolist(), strict=True))
