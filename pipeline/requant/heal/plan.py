"""How healing fits a machine: mode, memory and time, from a model's structure alone. Estimates, and called so.

whole       student and loss end to end; the teacher beside it (resident) or run before it (stored)
blocks      one block at a time against the merged model's block, for models that do not fit whole
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from requant.errors import InputError
from requant.heal.kl_loss import CHUNK_LOGITS
from requant.modeling import block_walk
from requant.numerics.grid import Grid
from requant.runtime.device import BUSY, USABLE, free_bytes, product_rate

Mode = Literal["whole", "blocks"]
BLOCK_WINDOWS = 256  # block by block all their hidden states are kept: more would not fit for large models
PER_SCALE = 7 * 4  # bytes: base, unit, offset, gradient, two moments, best; and the values in use


@dataclass(frozen=True, slots=True)
class Shape:
    """What memory and time depend on. inputs_outputs: widths of all linears of a block, added up."""

    quantized: int  # weights
    stored_bytes: int  # of their codes
    scales: int
    other: int  # parameters left in 16 bit
    largest: int  # weights of the largest quantized linear
    layers: int
    width: int
    vocabulary: int
    inputs_outputs: int

    @classmethod
    def of(cls, model: nn.Module, grids: Mapping[str, Grid]) -> Shape:
        """From a skeleton and the grid of every quantized linear."""
        linears = {name: model.get_submodule(name) for name in grids}
        sizes = {name: m.weight.numel() for name, m in linears.items()}  # type: ignore[operator]
        items = block_walk.block_list(model)[1]
        inside = block_walk.block_linears(items[0]).values()
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        return cls(
            quantized=sum(sizes.values()),
            stored_bytes=sum(n if grids[name].bits == 8 else n // 2 for name, n in sizes.items()),
            scales=sum(m.out_features * grids[name].groups(m.in_features) for name, m in linears.items()),  # type: ignore[arg-type,operator,misc]
            other=sum(p.numel() for p in model.parameters()) - sum(sizes.values()),
            largest=max(sizes.values()), layers=len(items), width=embedding.embedding_dim,
            vocabulary=embedding.num_embeddings, inputs_outputs=sum(m.in_features + m.out_features for m in inside),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fit:
    """A way to heal that fits. micro: windows in one forward. recompute: blocks run again in the backward pass."""

    mode: Mode
    resident: bool
    recompute: bool
    micro: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        how = {"whole": "end to end", "blocks": "block by block"}[self.mode]
        teacher = f", teacher {'beside it' if self.resident else 'run before it'}" if self.mode == "whole" else ""
        return f"{how}{teacher}, about {self.bytes / 1e9:.1f} GB and {max(self.seconds / 60, 0.1):.1f} min"


def choose(
    shape: Shape, *, steps: int, batch: int, length: int, unique: int, held: int, looks: int, device: torch.device,
    asked: Mode | Literal["auto"] = "auto", free: int | None = None, rate: float | None = None,
) -> Fit:  # fmt: skip
    """The fastest way that fits in `free` bytes of the device; raises InputError when none does.

    unique: windows that are read at all, the `held` ones among them, at which it looks `looks` times. rate: flops a second
    of matrix products.
    """
    room = USABLE * (free if free is not None else free_bytes(device))
    speed = (rate or product_rate(device)) * BUSY[device.type]
    tried: list[Fit] = []
    for fit in _ways(batch):
        if asked not in ("auto", fit.mode):
            continue
        found = replace(
            fit,
            bytes=_memory(shape, fit, length, unique, device),
            seconds=_flops(shape, fit, steps * batch * length, unique * length, looks * held * length) / speed,
        )
        if found.bytes <= room:
            return found
        tried.append(found)
    least = min(tried, key=lambda f: f.bytes)
    raise InputError(
        f"healing needs at least {least.bytes / 1e9:.1f} GB ({least.mode}), {device} has {room / USABLE / 1e9:.1f} GB free: "
        "lower heal.length, or set heal: off"
    )


def _ways(batch: int) -> list[Fit]:
    """From the fastest to the leanest."""
    micros = [batch // k for k in range(1, batch + 1) if batch % k == 0]
    whole = [
        Fit("whole", resident, again, micro, 0, 0.0)
        for resident in (True, False)
        for again in (False, True)
        for micro in micros[: 2 if not again else None]
    ]
    return whole + [Fit("blocks", False, False, micro, 0, 0.0) for micro in micros]


def _memory(s: Shape, fit: Fit, length: int, unique: int, device: torch.device) -> int:
    """Bytes on the device at the worst moment."""
    item = 2 if device.type == "cuda" else 4
    tokens = fit.micro * length
    block = tokens * s.inputs_outputs * (item + 4)  # what the backward pass of one block keeps
    rebuilt = 4 * s.largest * item
    if fit.mode == "blocks":
        one = (s.quantized * item + s.stored_bytes) // s.layers
        streams = 3 * min(unique, BLOCK_WINDOWS) * length * s.width * item
        return int(one + block + rebuilt + PER_SCALE * s.scales // s.layers + streams + s.other * item)
    kept = s.layers * tokens * s.width * 4 + block if fit.recompute else s.layers * block
    pupil = s.stored_bytes + s.other * item + PER_SCALE * s.scales
    teacher = (s.quantized + s.other) * item if fit.resident else 0
    return int(pupil + teacher + kept + rebuilt + 4 * 4 * CHUNK_LOGITS[device.type])


def _flops(s: Shape, fit: Fit, trained: int, seen: int, looks: int) -> float:
    """Multiplications and additions of all of healing. Tokens: trained on, seen at all, and in looks at held-out windows."""
    forward = 2 * (s.quantized + s.vocabulary * s.width)
    if fit.mode == "blocks":
        return 2.0 * s.quantized * (3 * trained + 3 * seen + looks)
    teacher = (trained if fit.resident else seen) * forward
    passes = 4 if fit.recompute else 3
    return float(teacher + looks * forward + trained * (2 * s.quantized * passes + 6 * s.vocabulary * s.width))
