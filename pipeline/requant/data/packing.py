"""Packed windows for calibration, in the shares of their text sources.

Where the tokenizer adds BOS every window begins with it, as every window that is scored does: models of such tokenizers
put much of their attention on it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from requant.data.documents import TokenDocument
from requant.errors import InputError

SHORTER = (512, 256)
"""Tokens of a window that a text too short for its share is said to allow."""
Entry = tuple[str, Sequence[TokenDocument], float]  # name, documents, share of the windows


def calibration_windows(
    entries: Sequence[Entry],
    *,
    samples: int,
    length: int,
    seed: int,
    bos: int | None,
    eos: int | None,
    notes: list[str] | None = None,
) -> Tensor:
    """Packed windows for calibration, int64 [samples, length], in the entries' shares, shuffled.

    Documents are shuffled, begin with `bos` and end with `eos` where these are not None, are packed end to end and cut
    by `cut`.
    notes: an entry whose share is no window is added. Raises InputError when an entry is too short for its share:
    nothing is repeated.
    """
    draw = random.Random(seed)
    counts = shares([share for _, _, share in entries], samples)
    if notes is not None:
        notes += left_without(entries, counts, "calibration", "calibration.samples or its share")
    chosen: list[list[int]] = []
    for (name, documents, _), count in zip(entries, counts, strict=True):
        stream: list[int] = []
        for document in draw.sample(list(documents), len(documents)):
            stream += document.marked(bos, eos)
        starts = _starts(stream, length, bos)
        available = len(starts)
        if available < count:
            raise InputError(
                f"calibration: {name} has {len(stream)} tokens, {available} windows of {length}, "
                f"but its share is {count}: lower calibration.samples or length, or give more text"
                + _what_fits(stream, length, bos, samples, count)
            )
        chosen += [_window(stream, at, length, bos) for at in draw.sample(starts, count)]
    draw.shuffle(chosen)
    return torch.tensor(chosen, dtype=torch.int64)


def _what_fits(stream: Sequence[int], length: int, bos: int | None, samples: int, count: int) -> str:
    """In brackets, how many samples a text that is too short allows, of its `length` and of shorter ones.

    count: how many of the `samples` are this text's share.
    """
    lengths = [length, *(n for n in SHORTER if n < length)]
    fits = [(len(_starts(stream, n, bos)) * samples // count, n) for n in lengths]
    words = " or ".join(f"{n} samples of {size} tokens" for n, size in fits if n)
    return f" (this text allows {words})" if words else ""


def cut(stream: Sequence[int], length: int, bos: int | None, most: int | None = None) -> list[list[int]]:
    """Windows of `length` tokens of a stream, one after the other; a rest that fills none is left out.

    bos: the first token of every window, put in front of those that do not begin with it; None: none is. most: so many
    windows at most.
    """
    return [_window(stream, at, length, bos) for at in _starts(stream, length, bos)[:most]]


def _starts(stream: Sequence[int], length: int, bos: int | None) -> list[int]:
    """Where in the stream its windows begin."""
    starts, at = [], 0
    while at < len(stream) and (after := at + length - _put_ahead(stream, at, bos)) <= len(stream):
        starts.append(at)
        at = after
    return starts


def _window(stream: Sequence[int], at: int, length: int, bos: int | None) -> list[int]:
    ahead = _put_ahead(stream, at, bos)
    return [*([bos] if ahead and bos is not None else []), *stream[at : at + length - ahead]]


def _put_ahead(stream: Sequence[int], at: int, bos: int | None) -> int:
    """Number of tokens that come before the stream's own in a window: BOS, where it does not begin with it."""
    return int(bos is not None and stream[at] != bos)


def shares(weights: Sequence[float], count: int) -> list[int]:
    """`count` split in proportion to the weights, by largest remainder; of equal ones the first gets more."""
    total = sum(map(Fraction, weights))
    exact = [count * Fraction(w) / total for w in weights]
    counts = [int(x) for x in exact]
    # Rounded, so that weights such as 0.1 and 0.7, which are no exact fractions, tie where they should.
    order = sorted(range(len(exact)), key=lambda i: -round(float(exact[i] - counts[i]), 9))
    for i in order[: count - sum(counts)]:
        counts[i] += 1
    return counts


def left_without(entries: Sequence[Entry], counts: Sequence[int], what: str, more: str) -> list[str]:
    """What to tell of entries whose share is no window. what: of what text. more: what to raise."""
    total = sum(share for _, _, share in entries)
    return [
        f"{what}: {name} gets none of the {sum(counts)} windows (its share is {share / total:.2g}): raise {more}, or "
        "leave it out"
        for (name, _, share), count in zip(entries, counts, strict=True)
        if not count
    ]


def digest(windows: Tensor) -> str:
    """sha256 of windows' token ids and shape, hex."""
    return hashlib.sha256(
        f"{tuple(windows.shape)}".encode() + windows.contiguous().numpy().astype("<i8").tobytes()
    ).hexdigest()
