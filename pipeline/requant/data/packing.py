"""Packed windows for calibration and healing, in the shares of their text sources."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from requant.data.documents import TokenDocument
from requant.data.tokenizer import adds_bos
from requant.errors import InputError

Entry = tuple[str, Sequence[TokenDocument], float]  # name, documents, share of the windows
MIN_WINDOWS_PER_HELD_OUT = 8  # at most one in so many windows of an entry is held out


@dataclass(frozen=True, slots=True)
class HealingText:
    """Packed windows for healing: training windows, then held-out ones.

    windows: int64 [n, length]. held_out: how many of the last windows are not trained on; they choose the best step.
    """

    windows: Tensor
    held_out: int

    @property
    def train(self) -> int:
        """Number of windows that are trained on: the first ones."""
        return len(self.windows) - self.held_out

    @property
    def length(self) -> int:
        """Tokens a window."""
        return int(self.windows.shape[1])

    @property
    def digest(self) -> str:
        """sha256 of the windows, hex."""
        return digest(self.windows)


def healing_windows(
    entries: Sequence[Entry], tokenizer: Any, *, steps: int, batch: int, length: int, seed: int
) -> HealingText:
    """Windows for `steps` steps of `batch`, and up to two batches of held-out ones."""
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    return pack(
        entries, train=steps * batch, held_out=2 * batch, length=length, seed=seed, bos=bos, eos=tokenizer.eos_token_id
    )


def pack(
    entries: Sequence[Entry],
    *,
    train: int,
    held_out: int,
    length: int,
    seed: int,
    bos: int | None,
    eos: int | None,
) -> HealingText:
    """Packed windows for healing: `train` to train on, at most `held_out` held out.

    The training windows are in the entries' shares, and held-out windows are of other text.
    Each entry gives its share of the held-out windows, but at least one and at most an eighth of its text.
    An entry that is shorter than its share of `train` is repeated, its documents in another order.
    Raises InputError when an entry has less text than two windows.
    """
    draw = random.Random(seed)
    counts, held_out_counts = (shares([share for _, _, share in entries], n) for n in (train, held_out))
    training: list[list[int]] = []
    validating: list[list[int]] = []
    for (name, documents, _), count, held_out_count in zip(entries, counts, held_out_counts, strict=True):
        order = [[*([] if bos is None else [bos]), *d.ids, *([] if eos is None else [eos])] for d in documents]
        draw.shuffle(order)
        total = sum(map(len, order))
        if total < 2 * length:
            raise InputError(
                f"healing: {name} has {total} tokens, a window to train on and a held-out one need {2 * length}: "
                "lower heal.length (--length), or give more text"
            )
        validated = max(1, min(held_out_count, total // length // MIN_WINDOWS_PER_HELD_OUT))
        stream: list[int] = []
        while len(stream) < validated * length:
            stream += order.pop()
        order.append(stream[validated * length :])
        validating += [stream[i * length : (i + 1) * length] for i in range(validated)]
        stream = []
        while len(stream) < count * length:
            draw.shuffle(order)
            for document in order:
                stream += document
        training += [stream[i * length : (i + 1) * length] for i in range(count)]
    draw.shuffle(training)
    return HealingText(torch.tensor(training + validating, dtype=torch.int64), len(validating))


def calibration_windows(
    entries: Sequence[Entry],
    *,
    samples: int,
    length: int,
    seed: int,
    bos: int | None,
    eos: int | None,
) -> Tensor:
    """Packed windows for calibration, int64 [samples, length], in the entries' shares, shuffled.

    Documents are shuffled, begin with `bos` and end with `eos` where these are not None, and are packed end to end.
    Raises InputError when an entry is too short for its share: nothing is repeated.
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
                f"calibration: {name} has {len(stream)} tokens, {available} windows of {length}, "
                f"but its share is {count}: lower calibration.samples or length, or give more text"
                + (f" ({available * samples // count} samples of this length would fit)" if available else "")
            )
        chosen += [stream[i * length : (i + 1) * length] for i in draw.sample(range(available), count)]
    draw.shuffle(chosen)
    return torch.tensor(chosen, dtype=torch.int64)


def shares(weights: Sequence[float], count: int) -> list[int]:
    """`count` split in proportion to the weights; the first part also gets the remainder."""
    counts = [int(count * w / sum(weights)) for w in weights]
    counts[0] += count - sum(counts)
    return counts


def digest(windows: Tensor) -> str:
    """sha256 of windows' token ids and shape, hex."""
    return hashlib.sha256(
        f"{tuple(windows.shape)}".encode() + windows.contiguous().numpy().astype("<i8").tobytes()
    ).hexdigest()
