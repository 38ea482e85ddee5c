"""Adapter probe: the loss on a few calibration rows with and without the adapter.

Files do not show whether an adapter of the right shape belongs to the base. But on text that the adapted model has
learned, the mean gain in log probability equals the divergence KL(adapted || base): E[ln p_a / p_b] under p_a. On
another base the adapter still changes the predictions, and the gain is small.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from requant.data.documents import TokenDocument

log = logging.getLogger(__name__)
MAX_ROWS, MAX_LENGTH, MIN_LENGTH = 6, 256, 16
# Gain per nat of KL(adapted || base). The demo's adapter has 0.96 on held-out text of its kind, 0.26 and 0.32 on other
# text; an adapter on another base of the same shape has 0.24 in the tests.
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


def sample_rows(
    names: Sequence[str], documents: Sequence[Sequence[TokenDocument]], bos: int | None = None
) -> dict[str, tuple[Tensor, ...]]:
    """A few rows of each calibration source, evenly spread, by name of the source.

    Rows are int64 [at most MAX_LENGTH], none shorter than MIN_LENGTH. bos: the first token of each; None: none is.
    """
    sampled = {}
    for name, every in zip(names, documents, strict=True):
        long = [d for d in every if len(d.ids) >= MIN_LENGTH]
        step = max(1, len(long) // MAX_ROWS)
        sampled[name] = tuple(torch.tensor(d.marked(bos, None)[:MAX_LENGTH]) for d in long[::step][:MAX_ROWS])
    return {name: rows for name, rows in sampled.items() if rows}


@torch.inference_mode()
def measure(model: Any, samples: Mapping[str, Sequence[Tensor]], device: torch.device) -> list[Probe]:
    """The losses of a PEFT model on each source's rows, with its adapters enabled and disabled."""

    def log_probabilities(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids[None].to(device)).logits[0, :-1]
        return logits.float().log_softmax(dim=-1)

    probes = []
    for source, rows in samples.items():
        sums, count = torch.zeros(3, dtype=torch.float64), 0
        for ids in rows:
            on = log_probabilities(ids)
            with model.disable_adapter():
                off = log_probabilities(ids)
            target = ids[1:, None].to(device)
            losses = [-p.gather(1, target).double().sum() for p in (off, on)]
            moved_by = torch.where(on.isneginf(), 0.0, on.exp() * (on - off))  # an excluded token adds nothing
            sums += torch.stack([*losses, moved_by.double().sum()]).cpu()
            count += len(ids) - 1
        without, with_adapter, moved = (sums / count).tolist()
        probes.append(Probe(source=source, without=without, with_adapter=with_adapter, moved=moved))
    return probes


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
