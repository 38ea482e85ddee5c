"""Evaluation sets: documents of token ids cut into windows by a protocol, and their digest.

- `documents`: every document is a cluster of consecutive windows without overlap. With a `bos_id`, every
  window starts with it (a BOS that a document already starts with is not doubled). All tokens but the first
  of a window are scored. A tail shorter than `tail` tokens is dropped, but a document's first window is kept
  whatever its length: short documents count. A tail that holds what is scored of a document of which not all is,
  such as an answer after a long prompt, is scored in a whole window that ends where the document does.
- `gptq-2048` (GPTQ's `datautils.py`): one joined document, windows of 2048, tail dropped, no BOS of ours,
  every window a cluster. `window` is ignored.
- `llamacpp-512` (llama.cpp `perplexity`): one joined document, windows of 512, tail dropped, first token of
  every window overwritten by `bos_id`, tokens 257..511 scored, every window a cluster. `window` is ignored.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor

from requant_eval.errors import EvaluationError
from requant_eval.scoring.set_description import Protocol, SetDescription

FIXED_WINDOW: dict[Protocol, int] = {"gptq-2048": 2048, "llamacpp-512": 512}


@dataclass(frozen=True)
class Document:
    """One text as token ids.

    ids: token ids, with or without the tokenizer's BOS in front.
    scored: one flag per id, e.g. True on completion tokens only; None scores all.
    n_bytes: UTF-8 bytes of the scored text (for bits per byte); 0 = unknown.
    """

    ids: tuple[int, ...]
    scored: tuple[bool, ...] | None = None
    n_bytes: int = 0

    @property
    def unscored(self) -> bool:
        """Whether no token of it is to be scored."""
        return self.scored is not None and not any(self.scored)


@dataclass(frozen=True)
class Window:
    """The tokens of one forward pass, and which of them count.

    document: number of its cluster. ids: int64 [T]. scored: bool [T]; where `scored[t]`, token t is predicted from
    tokens 0..t-1 and counted; `scored[0]` is always False.
    """

    document: int
    ids: Tensor
    scored: Tensor


@dataclass(frozen=True, kw_only=True)
class EvalSet(SetDescription):
    """A set of the recipe (`recipe.EvalSet`) as token windows, which variants are scored on.

    `Window.document` is a number from 0 to n_documents-1.
    """

    windows: tuple[Window, ...]


@dataclass
class _Cut:
    """The windows of one document (or of the joined text), and how many tokens its tail dropped."""

    windows: list[tuple[Tensor, Tensor]]
    dropped: int


@dataclass(kw_only=True)
class _Taken:
    """The windows of a set so far, and its counts (see `EvalSet`). n_bytes: NaN = unknown."""

    windows: list[Window] = field(default_factory=list)
    n_documents: int = 0
    n_scored: int = 0
    n_bytes: float = 0.0
    dropped: int = 0


def make_set(
    name: str,
    documents: Sequence[Document],
    *,
    window: int = 2048,
    protocol: Protocol = "documents",
    bos_id: int | None,
    tokens: int | None = None,
    tail: int = 64,
) -> EvalSet:
    """Cuts `documents` into windows by a protocol: `documents`, `gptq-2048` or `llamacpp-512`.

    Windows and documents with nothing to score are left out. bos_id: None = the tokenizer adds no BOS.
    tokens: stop after the window that reaches that many scored tokens. tail: shorter tails of a document are
    dropped.

    Raises:
        EvaluationError: nothing to score, or the arguments don't fit each other.
    """
    window = FIXED_WINDOW.get(protocol, window)
    _check(name, documents, window, protocol, tokens)
    taken = _take(documents, window=window, protocol=protocol, bos_id=bos_id, tokens=tokens, tail=tail)
    if not taken.windows:
        unmarked = sum(d.unscored for d in documents)
        why = f"{unmarked} of them hold no token that is to be scored, such as an answer" if unmarked else ""
        raise EvaluationError(
            f"set '{name}': nothing to score in {len(documents)} documents (protocol {protocol}, window "
            f"{window}, {taken.dropped} tokens in dropped tails): {why or 'give longer texts'}"
        )
    return EvalSet(
        name=name,
        windows=tuple(taken.windows),
        digest=digest(taken.windows),
        n_documents=taken.n_documents,
        n_scored=taken.n_scored,
        n_bytes=0 if math.isnan(taken.n_bytes) else round(taken.n_bytes),
        dropped=taken.dropped,
        protocol=protocol,
        window=window,
        bos=bos_id is not None and protocol != "gptq-2048",
    )


def _take(
    documents: Sequence[Document], *, window: int, protocol: Protocol, bos_id: int | None, tokens: int | None, tail: int
) -> _Taken:
    """The windows of the documents in order, until they have `tokens` scored tokens."""
    taken = _Taken()
    for document in documents:
        cut = _cut(document, window, protocol, bos_id, tail)
        scored = 0
        for ids, mask in cut.windows:
            if tokens is not None and taken.n_scored + scored >= tokens:
                break
            taken.windows.append(Window(taken.n_documents, ids, mask))
            scored += int(mask.sum())
            taken.n_documents += protocol != "documents"
        else:
            taken.dropped += cut.dropped
        if scored:
            taken.n_bytes = _add_bytes(taken.n_bytes, document, scored)
            taken.n_documents += protocol == "documents"
        taken.n_scored += scored
        if tokens is not None and taken.n_scored >= tokens:
            break
    return taken


def digest(windows: Sequence[Window]) -> str:
    """sha256 (hex) over document number, length, int64 ids and mask of every window, in order."""
    sha = hashlib.sha256()
    for w in windows:
        sha.update(torch.tensor([w.document, len(w.ids)], dtype=torch.int64).numpy().astype("<i8").tobytes())
        sha.update(w.ids.numpy().astype("<i8").tobytes())
        sha.update(w.scored.numpy().astype("u1").tobytes())
    return sha.hexdigest()


def _check(name: str, documents: Sequence[Document], window: int, protocol: Protocol, tokens: int | None) -> None:
    if protocol not in get_args(Protocol):
        raise EvaluationError(f"set '{name}': unknown protocol '{protocol}', use one of {get_args(Protocol)}")
    if window < 2:
        raise EvaluationError(f"set '{name}': window is {window}, needs at least 2 tokens")
    if tokens is not None and tokens < 1:
        raise EvaluationError(f"set '{name}': tokens is {tokens}, needs at least 1 or none for all")
    if protocol != "documents" and len(documents) != 1:
        raise EvaluationError(
            f"set '{name}': protocol {protocol} scores one joined text, got {len(documents)} documents"
        )
    for i, d in enumerate(documents):
        if d.scored is not None and len(d.scored) != len(d.ids):
            raise EvaluationError(f"set '{name}': document {i} has {len(d.ids)} ids but {len(d.scored)} scored flags")


def _add_bytes(total: float, document: Document, taken: int) -> float:
    """Adds the scored share of the document's bytes; NaN if the document's bytes are unknown."""
    if document.n_bytes <= 0:
        return float("nan")
    scorable = len(document.ids) if document.scored is None else sum(document.scored)
    return total + document.n_bytes * min(1.0, taken / scorable)


def _cut(document: Document, window: int, protocol: Protocol, bos_id: int | None, tail: int) -> _Cut:
    ids = torch.tensor(document.ids, dtype=torch.int64)
    mask = torch.ones(len(ids), dtype=torch.bool)
    if document.scored is not None:
        mask = torch.tensor(document.scored, dtype=torch.bool)
    if protocol == "documents":
        return _cut_document(ids, mask, window, bos_id, tail, in_part=document.scored is not None)
    return _cut_joined(ids, mask, window, protocol, bos_id)


def _cut_document(ids: Tensor, mask: Tensor, window: int, bos_id: int | None, tail: int, *, in_part: bool) -> _Cut:
    """in_part: whether tokens may be context alone, so that those in a short tail are what the document is for."""
    cut = _Cut([], 0)
    if bos_id is not None and len(ids) and int(ids[0]) == bos_id:
        ids, mask = ids[1:], mask[1:]
    step = window if bos_id is None else window - 1
    for start, part in _slices(ids, step):
        scored = mask[start : start + step].clone()
        if start and len(part) < tail and len(part) < step:
            if not (in_part and scored.any()):
                cut.dropped += len(part)
                continue
            part, before = ids[-step:].clone(), torch.zeros(step - len(part), dtype=torch.bool)
            scored = torch.cat([before, scored])
        if bos_id is None:
            scored[0] = False
        else:
            part = torch.cat([torch.tensor([bos_id]), part])
            scored = torch.cat([torch.tensor([False]), scored])
        if scored.any():
            cut.windows.append((part, scored))
    return cut


def _cut_joined(ids: Tensor, mask: Tensor, window: int, protocol: Protocol, bos_id: int | None) -> _Cut:
    cut = _Cut([], len(ids) % window)
    for start, part in _slices(ids[: len(ids) - cut.dropped], window):
        scored = mask[start : start + window].clone()
        if protocol == "llamacpp-512":
            part = part.clone()
            if bos_id is not None:
                part[0] = bos_id
            scored[: window // 2 + 1] = False
        scored[0] = False
        if scored.any():
            cut.windows.append((part, scored))
    return cut


def _slices(ids: Tensor, step: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(ids), step):
        yield start, ids[start : start + step].clone()
