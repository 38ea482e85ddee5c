"""Adapter probe: the loss on a few calibration rows with and without the adapter.

Files do not show whether an adapter of the right shape belongs to the base. But on text that the adapted model has
learned, the mean gain in log probability equals the divergence KL(adapted || base): E[ln p_a / p_b] under p_a. On
another base the adapter still changes the predictions, and the gain is small.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from requant.data.documents import TokenDocument
from requant.data.packing import digest
from requant_eval.scoring import batches
from requant_eval.scoring.batches import BatchSize

log = logging.getLogger(__name__)
MAX_ROWS, MAX_LENGTH, MIN_LENGTH = 6, 256, 16
# Logits of a batch, with the adapter and again without: at most what scoring holds of a chunk. On a CPU a row's.
MAX_LOGITS = {"cpu": 2**23, "cuda": 2**27}
# Gain per nat of KL(adapted || base). The demo's adapter has 0.96 on held-out text of its kind, 0.26 and 0.32 on other
# text; an adapter on another base of the same shape has 0.24 in the tests. The second fine-tune, trained without loss
# on questions, has 0.96 on answers and 0.24 on whole chats.
LOW_EFFICIENCY = 0.35
LEAST_MOVED = 1e-3  # nats a token: below, gain per nat is the ratio of two roundings. The demo's adapter moves 0.2


@dataclass(frozen=True, slots=True)
class Probe:
    """Losses on the rows of one calibration source, in nats a token.

    moved: mean KL(with the adapter || without).
    """

    source: str
    without: float
    with_adapter: float
    moved: float

    @property
    def gain(self) -> float:
        """The decrease of the loss by the adapter."""
        return self.without - self.with_adapter

    @property
    def efficiency(self) -> float:
        """Gain per nat of KL(with the adapter || without).

        About 1 on text that the adapter has learned; 0 where predictions are unchanged.
        """
        return self.gain / self.moved if self.moved > 0 else 0.0


class ProbeFacts(TypedDict):
    """A `Probe` as stored."""

    source: str
    without: float
    with_adapter: float
    moved: float


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """A row of the probe. ids: int64 [length]. counted: bool [length], the tokens whose loss is measured."""

    ids: Tensor
    counted: Tensor

    @classmethod
    def whole(cls, ids: Tensor) -> ProbeRow:
        """A row all of whose tokens count."""
        return cls(ids, torch.ones(len(ids), dtype=torch.bool))

    @property
    def tokens(self) -> int:
        """How many tokens count; the first one cannot, since nothing predicts it."""
        return int(self.counted[1:].sum())

    @property
    def digest(self) -> tuple[str, str]:
        """Digests of ids and of what counts."""
        return digest(self.ids[None]), digest(self.counted[None].long())

    def cut(self, length: int) -> ProbeRow:
        """Its first tokens; all of them count where none of them did."""
        ids, counted = self.ids[:length], self.counted[:length]
        return ProbeRow(ids, counted) if counted[1:].any() else ProbeRow.whole(ids)


def sample_rows(
    names: Sequence[str], documents: Sequence[Sequence[TokenDocument]], bos: int | None = None
) -> dict[str, tuple[ProbeRow, ...]]:
    """A few rows of each calibration source, evenly spread, by name of the source.

    The flagged tokens of a document count: of a chat its answers, since training may have had no loss on the questions.
    Rows have at most MAX_LENGTH tokens, so that half of them may be answer, and at least MIN_LENGTH. bos: the first
    token of each; None: none is.
    """
    sampled = {}
    for name, every in zip(names, documents, strict=True):
        long = [d for d in every if len(d.ids) >= MIN_LENGTH and any(d.scored)]
        step = max(1, len(long) // MAX_ROWS)
        sampled[name] = tuple(_row(d, bos) for d in long[::step][:MAX_ROWS])
    return {name: rows for name, rows in sampled.items() if rows}


def _row(document: TokenDocument, bos: int | None) -> ProbeRow:
    """The beginning of a document, or of what leads to its first answer where that begins late."""
    first, most = document.scored.index(True), MAX_LENGTH - (bos is not None)
    end = max(most, min(len(document.ids), first + most // 2))
    begin = max(0, end - most)
    ids, counted = list(document.ids[begin:end]), list(document.scored[begin:end])
    if bos is not None:
        ids, counted = [bos, *ids], [False, *counted]
    return ProbeRow(torch.tensor(ids), torch.tensor(counted)).cut(MAX_LENGTH)


@torch.inference_mode()
def measure(
    model: Any, samples: Mapping[str, Sequence[ProbeRow]], device: torch.device, batch: BatchSize | int = 1
) -> list[Probe]:
    """The losses of a PEFT model on each source's rows, with its adapters enabled and disabled.

    batch: how much runs at a time, of all sources together, as far as its logits are at most MAX_LOGITS.
    """
    sampled = [row for many in samples.values() for row in many]
    rows = [row.ids for row in sampled]
    sums = torch.zeros(len(rows), 3, dtype=torch.float64, device=device)
    for numbers in _batches(model, rows, device, BatchSize.of(batch)):
        ids = batches.padded([rows[i] for i in numbers]).to(device)
        on = model(input_ids=ids).logits
        with model.disable_adapter():
            off = model(input_ids=ids).logits
        for at, number in enumerate(numbers):
            counted = sampled[number].counted[1:].to(device)
            sums[number] = _sums(on[at], off[at], ids[at, : len(rows[number])], counted)
    probes, found, begin = [], sums.cpu(), 0
    for source, many in samples.items():
        end = begin + len(many)
        tokens = sum(row.tokens for row in many)
        without, with_adapter, moved = (found[begin:end].sum(0) / tokens).tolist()
        probes.append(Probe(source=source, without=without, with_adapter=with_adapter, moved=moved))
        begin = end
    return probes


def _batches(model: Any, rows: Sequence[Tensor], device: torch.device, size: BatchSize) -> list[tuple[int, ...]]:
    """Numbers of the rows that run together; of one length only where padding changes what the model computes."""
    if size.windows == 1:
        return [(number,) for number in range(len(rows))]
    config, lengths = model.config, [len(row) for row in rows]
    at_once = MAX_LOGITS[device.type] // config.get_text_config().vocab_size
    size = replace(size, tokens=max(1, at_once if size.tokens is None else min(size.tokens, at_once)))
    plan = batches.plan(lengths, size, padded_up_to=batches.padded_up_to(config))
    if plan.widest is not None:
        numbers = plan.batches[plan.widest]
        ids = batches.padded([rows[i] for i in numbers]).to(device)
        alone = rows[numbers[-1]][None].to(device)
        if batches.padding_changes(model(input_ids=ids).logits[-1], model(input_ids=alone).logits[0]):
            log.info(batches.APART.format("the adapter probe"))
            plan = batches.plan(lengths, size, padded_up_to=0)
    return list(plan.batches)


def _sums(on: Tensor, off: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
    """float64 [3]: the losses of a row without and with the adapter, and KL(with || without), each summed over tokens.

    on, off: logits [at least length, vocab] with the adapter and without. ids: int64 [length]. counted: bool
    [length - 1], of the tokens after the first.
    """
    log_on, log_off = (logits[: len(ids) - 1][counted].float().log_softmax(dim=-1) for logits in (on, off))
    losses = [-p.gather(1, ids[1:, None][counted]).double().sum() for p in (log_off, log_on)]
    moved_by = torch.where(log_on.isneginf(), 0.0, log_on.exp() * (log_on - log_off))  # an excluded token adds nothing
    return torch.stack([*losses, moved_by.double().sum()])


def verdict(probes: Sequence[Probe]) -> tuple[str, list[str]]:
    """(one line of what was measured, warnings), from the source with the highest efficiency.

    The others do not matter: a mix also holds general text, on which an adapter gains nothing.
    """
    best = max(probes, key=lambda p: (p.moved >= LEAST_MOVED, p.efficiency))
    summary = (
        f"loss on {best.source}: {best.without:.3f} without the adapter, {best.with_adapter:.3f} with it, "
        f"predictions moved by {best.moved:.3f} nats"
    )
    if best.moved < LEAST_MOVED:
        return summary, [
            f"the adapter changes next to nothing on calibration text ({summary}): was it trained, on this base and on "
            "this kind of text?"
        ]
    if best.efficiency >= LOW_EFFICIENCY:
        return summary, []
    found = "does not lower the loss" if best.gain <= 0 else "moves predictions far and gains little"
    return summary, [
        f"the adapter {found} on calibration text ({summary}): right shape, but is this the base it was trained on (an "
        "instruct model's adapter on the base model looks like this), and is this its kind of text?"
    ]
