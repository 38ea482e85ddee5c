"""The text that healing reads: packed windows in the sources' shares, and others, of other text, that judge."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from requant.data.documents import Tokens, adds_bos
from requant.errors import InputError

HELD_SHARE = 8  # at most one in so many windows of an entry is held out


def draw(
    entries: Sequence[tuple[str, Sequence[Tokens], float]], tokenizer: Any, *, steps: int, batch: int, length: int,
    seed: int,
) -> tuple[Tensor, int]:  # fmt: skip
    """(windows int64, how many of them at the end are held out): two batches' worth judge, if there is that much text."""
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    return pack(
        entries, train=steps * batch, held=2 * batch, length=length, seed=seed, bos=bos, eos=tokenizer.eos_token_id
    )


def pack(
    entries: Sequence[tuple[str, Sequence[Tokens], float]], *, train: int, held: int, length: int, seed: int,
    bos: int | None, eos: int | None,
) -> tuple[Tensor, int]:  # fmt: skip
    """(packed windows int64 [train + n, length] in the entries' shares, n): the last n <= `held` judge.

    They share no text with the others; each entry gives its share of them, but at least one and at most an eighth of its
    text. Where an entry is shorter than its share of `train`, it is read again, its documents in another order. Raises
    InputError when an entry has less text than two windows.
    """
    draw = random.Random(seed)
    counts, kept = (shares([share for _, _, share in entries], n) for n in (train, held))
    trained: list[list[int]] = []
    judging: list[list[int]] = []
    for (name, documents, _), count, apart in zip(entries, counts, kept, strict=True):
        order = [[*([] if bos is None else [bos]), *d.ids, *([] if eos is None else [eos])] for d in documents]
        draw.shuffle(order)
        total = sum(map(len, order))
        if total < 2 * length:
            raise InputError(
                f"healing: {name} has {total} tokens, a window to train on and a held-out one need {2 * length}: "
                "lower heal.length (--length), or give more text"
            )
        apart = max(1, min(apart, total // length // HELD_SHARE))
        stream: list[int] = []
        while len(stream) < apart * length:
            stream += order.pop()
        order.append(stream[apart * length :])
        judging += [stream[i * length : (i + 1) * length] for i in range(apart)]
        stream = []
        while len(stream) < count * length:
            draw.shuffle(order)
            for document in order:
                stream += document
        trained += [stream[i * length : (i + 1) * length] for i in range(count)]
    draw.shuffle(trained)
    return torch.tensor(trained + judging, dtype=torch.int64), len(judging)


def calibration_windows(
    entries: Sequence[tuple[str, Sequence[Tokens], float]],
    *,
    samples: int,
    length: int,
    seed: int,
    bos: int | None,
    eos: int | None,
) -> Tensor:
    """Packed windows int64 [samples, length], `share` of them from each (name, documents, share) entry, shuffled.

    Documents are shuffled, each begins with `bos` and ends with `eos` where there is one, and are packed end to end.
    Raises InputError when an entry is too short for its share: nothing is repeated to fill up.
    """
    draw = random.Random(seed)
    counts = shares([share for _, _, share in entries], samples)
    chosen: list[list[int]] = []
    for (name, documents, _), count in zip(entries, counts, strict=True):
        stream: list[int] = []
        for document in draw.sample(list(documents), len(documents)):
            stream += [*([] if bos is None else [bos]), *document.ids, *([] if eos is None else [eos])]
        available = len(stream) // length
        if available < count:
            raise InputError(
                f"calibration: {name} has {len(stream)} tokens, {available} windows of {length}, but its share is {count}: "
                "lower calibration.samples or length, or give more text"
            )
        chosen += [stream[i * length : (i + 1) * length] for i in draw.sample(range(available), count)]
    draw.shuffle(chosen)
    return torch.tensor(chosen, dtype=torch.int64)


def shares(weights: Sequence[float], count: int) -> list[int]:
    """`count` split by weight, the remainder to the first."""
    counts = [int(count * w / sum(weights)) for w in weights]
    counts[0] += count - sum(counts)
    return counts


def digest(windows: Tensor) -> str:
    """sha256 of token ids and their layout, hex."""
    return hashlib.sha256(
        f"{tuple(windows.shape)}".encode() + windows.contiguous().numpy().astype("<i8").tobytes()
    ).hexdigest()
