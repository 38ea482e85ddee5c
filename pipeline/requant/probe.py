"""Does the adapter help on this base? The loss on a few calibration rows without it, with half of it, and with all of it.

Right shape and wrong base shows nowhere in files. On the base it was trained on an adapter lowers the loss on its own
text, and all of it lowers it more than half: training went on until a longer step no longer paid.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from requant.data import Tokens

log = logging.getLogger(__name__)
ROWS, LENGTH, LEAST = 6, 256, 16
OVERSHOOT = 0.01  # nats by which half of the adapter must be better than all of it to be worth a word


@dataclass(frozen=True, slots=True)
class Probe:
    """Mean loss in nats a token on the rows of one calibration source; half is None for adapters that cannot be scaled."""

    source: str
    without: float
    half: float | None
    whole: float

    @property
    def gain(self) -> float:
        """How much the adapter lowers the loss."""
        return self.without - self.whole


def rows(names: Sequence[str], documents: Sequence[Sequence[Tokens]]) -> dict[str, tuple[Tensor, ...]]:
    """A few rows of each calibration source, evenly spread: int64 [at most LENGTH], none shorter than LEAST."""
    found = {}
    for name, every in zip(names, documents, strict=True):
        long = [d for d in every if len(d.ids) >= LEAST]
        step = max(1, len(long) // ROWS)
        found[name] = tuple(torch.tensor(d.ids[:LENGTH]) for d in long[::step][:ROWS])
    return {name: chosen for name, chosen in found.items() if chosen}


@torch.inference_mode()
def measure(model: Any, samples: Mapping[str, Sequence[Tensor]], device: torch.device) -> list[Probe]:
    """The losses of a PEFT model on each source's rows."""

    def loss(source: str) -> float:
        total, count = 0.0, 0
        for ids in samples[source]:
            logits = model(input_ids=ids[None].to(device)).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[1:].to(device), reduction="sum"))
            count += len(ids) - 1
        return total / count

    found = []
    for source in samples:
        with model.disable_adapter():
            without = loss(source)
        found.append(Probe(source, without, _halved(model, lambda s=source: loss(s)), loss(source)))
    return found


def _halved(model: Any, loss: Any) -> float | None:
    """The loss with every LoRA at half its scale; None when there is none that can be scaled."""
    from peft.tuners.lora.layer import LoraLayer

    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and not any(m.use_dora.values())]
    if not layers or any(v for m in layers for v in m.merged_adapters):
        return None
    before = [dict(m.scaling) for m in layers]
    try:
        for layer in layers:
            for name in layer.scaling:
                layer.scaling[name] *= 0.5
        return float(loss())
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def verdict(probes: Sequence[Probe]) -> tuple[str, list[str]]:
    """(one line of what was measured, warnings). The source that the adapter helps most counts: a mix holds general text."""
    best = max(probes, key=lambda p: p.gain)
    said = f"loss on {best.source}: {best.without:.3f} without the adapter, {best.whole:.3f} with it"
    if best.gain <= 0:
        every = "its rows" if len(probes) == 1 else "rows of any calibration source"
        return said, [
            f"the adapter does not lower the loss on {every} ({said}): right shape, but is this the base it was trained on, "
            "and is this its kind of text? An adapter for an instruct model on the base model looks like this"
        ]
    if best.half is not None and best.half < best.whole - OVERSHOOT:
        return said, [
            f"half of the adapter is better than all of it ({said}, {best.half:.3f} with half): it overshoots, as adapters do on "
            "a base that is not the one they were trained on, or on text unlike their own"
        ]
    return said, []
