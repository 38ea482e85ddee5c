"""The text that healing reads: packed windows in the sources' shares, and others, of other text, that judge."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from requant import data
from requant.errors import InputError

HELD_SHARE = 8  # at most one in so many windows of an entry is held out


def draw(
    entries: Sequence[tuple[str, Sequence[data.Tokens], float]], tokenizer: Any, *, steps: int, batch: int, length: int,
    seed: int,
) -> tuple[Tensor, int]:  # fmt: skip
    """(windows int64, how many of them at the end are held out): two batches' worth judge, if there is that much text."""
    bos = tokenizer.bos_token_id if data.adds_bos(tokenizer) else None
    return pack(
        entries, train=steps * batch, held=2 * batch, length=length, seed=seed, bos=bos, eos=tokenizer.eos_token_id
    )


def pack(
    entries: Sequence[tuple[str, Sequence[data.Tokens], float]], *, train: int, held: int, length: int, seed: int,
    bos: int | None, eos: int | None,
) -> tuple[Tensor, int]:  # fmt: skip
    """(packed windows int64 [train + n, length] in the entries' shares, n): the last n <= `held` judge.

    They share no text with the others; each entry gives its share of them, but at least one and at most an eighth of its
    text. Where an entry is shorter than its share of `train`, it is read again, its documents in another order. Raises
    InputError when an entry has less text than two windows.
    """
    draw = random.Random(seed)
    counts, kept = (data.shares([share for _, _, share in entries], n) for n in (train, held))
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
