"""Packed windows for healing: to train on, to choose a step by, to judge that step by.

The three slices hold different text. Documents that stand in the text more than once, the same or nearly, are in one
slice only. A document that is cut between slices goes on in another one, with the text after the cut.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from requant.data import packing
from requant.data.duplicates import same_text
from requant.data.packing import Entry, cut, shares
from requant.data.tokenizer import adds_bos
from requant.errors import InputError

MIN_WINDOWS_PER_HELD_OUT = 8  # at most one in so many windows of an entry is held out
NOT_JUDGED = (
    "healing: the text is too short for windows that judge the chosen step (each source needs three windows of "
    "heal.length tokens): the KL that is reported also chose the step, and is a little too good"
)


@dataclass(frozen=True, slots=True)
class HealingText:
    """Packed windows for healing: training windows, then those that choose, then those that judge.

    windows: int64 [n, length]. choosing: how many choose the best step. judging: how many of the last windows judge it,
    not looked at before; 0 where the text is too short. held_out_sources: number of the source of each of these. names,
    reads: of every source, how often its text is read in all steps.
    """

    windows: Tensor
    choosing: int
    judging: int = 0
    held_out_sources: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    reads: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.held_out_sources:
            object.__setattr__(self, "held_out_sources", (0,) * self.held_out)

    @property
    def train(self) -> int:
        """Number of windows that are trained on: the first ones."""
        return len(self.windows) - self.held_out

    @property
    def held_out(self) -> int:
        """Number of windows that are not trained on: the last ones."""
        return self.choosing + self.judging

    @property
    def length(self) -> int:
        """Tokens a window."""
        return int(self.windows.shape[1])

    @property
    def digest(self) -> str:
        """sha256 of the windows and of what each is for, hex."""
        parts = packing.digest(self.windows), self.choosing, self.judging, *self.held_out_sources
        return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()


def healing_windows(
    entries: Sequence[Entry],
    tokenizer: Any,
    *,
    steps: int,
    batch: int,
    length: int,
    seed: int,
    notes: list[str] | None = None,
) -> HealingText:
    """Windows for `steps` steps of `batch`, and up to two batches of held-out ones. notes: as in `pack`."""
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    return pack(
        entries,
        train=steps * batch,
        held_out=2 * batch,
        length=length,
        seed=seed,
        bos=bos,
        eos=tokenizer.eos_token_id,
        notes=notes,
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
    notes: list[str] | None = None,
) -> HealingText:
    """Packed windows for healing: `train` to train on, at most `held_out` held out.

    The training windows are in the entries' shares. Each entry gives its share of the held-out windows, but at most an
    eighth of its text, and at least one window to choose by and one to judge by (of two windows of text, only the
    former). Half of them judges, rounded down. An entry that is shorter than
    its share of `train` is repeated, its documents in another order: each text once before any twice.
    notes: what the user should know is added. Raises InputError when an entry has less text than two windows.
    """
    draw = random.Random(seed)
    counts, held_out_counts = (shares([share for _, _, share in entries], n) for n in (train, held_out))
    told = packing.left_without(entries, counts, "healing", "heal.steps, heal.batch or its share")
    same = iter(same_text([d.ids for _, documents, _ in entries for d in documents]))
    pools = [
        _Pool(name, [(next(same), d.marked(bos, eos)) for d in documents], length, bos, draw)
        for name, documents, _ in entries
    ]
    used = [(pool, count, held) for pool, count, held in zip(pools, counts, held_out_counts, strict=True) if count]
    taken: set[int] = set()
    choosing: list[list[int]] = []
    judging: list[list[int]] = []
    sources: tuple[list[int], list[int]] = [], []
    for source, (pool, _, held) in enumerate(used):
        sizes = pool.held_out(held)
        for part, size, numbers in zip((choosing, judging), sizes, sources, strict=True):
            part += pool.take(size, taken)
            numbers += [source] * size
    training = [window for pool, count, _ in used for window in pool.training(count, taken)]
    draw.shuffle(training)
    if notes is not None:
        notes += [*told, *_copies(pools, taken), *([] if judging else [NOT_JUDGED])]
    return HealingText(
        torch.tensor([*training, *choosing, *judging], dtype=torch.int64),
        len(choosing),
        len(judging),
        held_out_sources=(*sources[0], *sources[1]),
        names=tuple(pool.name for pool, _, _ in used),
        reads=tuple(pool.reads for pool, _, _ in used),
    )


class _Pool:
    """The documents of one entry, by the text that they are.

    texts: number of a text -> its documents, all copies. order: numbers of texts that can be held out, the next one
    last. rests: what was left of documents when they were cut. length, bos: of the windows. reads: how often `training`
    reads the text.
    """

    def __init__(
        self, name: str, documents: Sequence[tuple[int, list[int]]], length: int, bos: int | None, draw: random.Random
    ) -> None:
        self.name, self.length, self.bos, self.draw = name, length, bos, draw
        self.texts: dict[int, list[list[int]]] = {}
        for number, document in documents:
            self.texts.setdefault(number, []).append(document)
        self.different = sum(len(copies[0]) for copies in self.texts.values())
        self.order = list(self.texts)
        draw.shuffle(self.order)
        # Of what most of an entry is, holding out one document would cost all that are like it: only in need.
        most = sum(len(document) for _, document in documents) / MIN_WINDOWS_PER_HELD_OUT
        self.order.sort(key=lambda number: len(self.texts[number]) == 1 or sum(map(len, self.texts[number])) <= most)
        self.rests: list[list[int]] = []
        self.reads = 0.0

    def held_out(self, wanted: int) -> tuple[int, int]:
        """How many windows choose, how many judge. Raises InputError where there is too little different text."""
        available = self.different // self.length
        if available < 2:
            raise self._too_little(self.different)
        least = min(2, available - 1)
        count = max(least, min(wanted, available // MIN_WINDOWS_PER_HELD_OUT))
        return count - count // 2, count // 2

    def take(self, count: int, taken: set[int]) -> list[list[int]]:
        """Windows of texts of which nothing was `taken`, in need of what was left of a cut document."""
        stream: list[int] = []
        used = count * self.length
        while len(stream) < used:
            if self.order:
                number = self.order.pop()
                if number not in taken:
                    taken.add(number)
                    stream += self.texts[number][0]
            elif self.rests:
                stream += self.rests.pop()
            else:
                raise self._too_little(len(stream))
        self.rests += [stream[used:]] if len(stream) > used else []
        return cut(stream[:used], self.length, self.bos, count)

    def training(self, count: int, taken: set[int]) -> list[list[int]]:
        """Windows of all that is not held out, read again and again in another order until there are `count`."""
        kept = [copies for number, copies in self.texts.items() if number not in taken]
        first = [*self.rests, *(copies[0] for copies in kept)]
        again = [document for copies in kept for document in copies[1:]]
        found = sum(map(len, [*first, *again]))
        if found < self.length:
            raise self._too_little(found)
        stream: list[int] = []
        while len(stream) < count * self.length:
            for documents in (first, again):
                self.draw.shuffle(documents)
                for document in documents:
                    stream += document
        self.reads = count * self.length / sum(map(len, first))
        return cut(stream, self.length, self.bos, count)

    def _too_little(self, found: int) -> InputError:
        copies = sum(map(len, self.texts.values())) - len(self.texts)
        without = f" beside {copies} copies of documents" if copies else ""
        return InputError(
            f"healing: {self.name} has {found} tokens{without}, a window to train on and a held-out one need "
            f"{2 * self.length}: lower heal.length (--length), or give more text"
        )


def _copies(pools: Sequence[_Pool], taken: set[int]) -> list[str]:
    """How many documents are copies of each other, if any are. taken: numbers of texts that are held out."""
    copies = Counter(number for pool in pools for number, found in pool.texts.items() for _ in found)
    repeated = sum(count for count in copies.values() if count > 1)
    if not repeated:
        return []
    left_out = sum(copies[number] - 1 for number in taken)
    return [
        f"healing: {repeated} of {copies.total()} documents stand in the text more than once, the same or nearly; "
        f"{left_out} copies of what is held out are not trained on"
    ]
