"""Forecast of the merge: one tensor of each shape and action is timed, sizes are summed."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from requant.merge.plan import Op
from requant.merge.stage import compute
from requant.merge.stored_dtype import bound, expected_dtype
from requant.run.check.rehearsal import cost_of
from requant.run.prepared import Prepared

PROBED = 64 * 2**20  # bytes written to know the disk


@dataclass(frozen=True, slots=True)
class Need:
    """Forecast of one stage: seconds, peak bytes of the host.

    device: peak bytes of the GPU, 0 without one. written: bytes on the disk of a format, 0: of another stage.
    """

    stage: str
    seconds: float
    host: int
    device: int = 0
    written: int = 0

    def __str__(self) -> str:
        time = f"{self.seconds:.0f} s" if self.seconds < 100 else f"{self.seconds / 60:.1f} min"
        gpu = f", {self.device / 1e9:.1f} GB of the GPU" if self.device else ""
        disk = f", writes {self.written / 1e9:.2f} GB" if self.written else ""
        return f"{self.stage} about {time}, {self.host / 1e9:.1f} GB of memory{gpu}{disk}"


@dataclass(frozen=True, slots=True)
class Disk:
    """Seconds a byte: write to a file, sync to the disk, fetch from a GPU."""

    write: float
    sync: float
    fetch: float

    @classmethod
    def probed(cls, folder: Path, device: torch.device) -> Disk:
        block = torch.zeros(PROBED, dtype=torch.uint8, device=device)
        fetch = cost_of(device, block.cpu).seconds if device.type == "cuda" else 0.0
        data = block.cpu().numpy().data
        with (folder / "probe").open("wb", buffering=0) as file:
            write = cost_of(torch.device("cpu"), lambda: file.write(data)).seconds
            sync = cost_of(torch.device("cpu"), lambda: os.fsync(file.fileno())).seconds
        return cls(write / PROBED, sync / PROBED, fetch / PROBED)


def merging(p: Prepared, device: torch.device, started: int, disk: Disk) -> Need:
    """Forecast of the merge. Writing a tensor overlaps with computing the next."""
    kinds: dict[tuple[Any, ...], list[Op]] = defaultdict(list)
    for op in p.merge.plan.ops:
        kinds[op.shape, op.action].append(op)
    target = merged_in(p)
    seconds, before, worst = 0.0, 0.0, 0
    on_gpu: dict[tuple[Any, ...], Made] = {}
    for kind, ops in kinds.items():
        made = partial(_made, p, ops[-1], device, target)
        first, cost = cost_of(device, made), cost_of(device, made)
        if device.type == "cuda":
            on_gpu[kind] = Made.of(p, ops[-1], device, target)
        seconds += cost.seconds * len(ops)
        if p.recipe.merge.dtype == "auto" and target == torch.float16:
            before += cost_of(device, partial(bound, p.merge.plan, ops[-1])).seconds * len(ops)
        size = math.prod(ops[-1].shape)
        made_of = size * target.itemsize if device.type == "cuda" else max(first.bytes, cost.bytes)
        worst = max(worst, made_of + size * target.itemsize)  # with the one before, which is being written
    total = sum(s.nbytes for s in p.merge.plan.slots(target))
    seconds = before + max(seconds, total * (disk.fetch + disk.write)) + total * disk.sync
    return Need("merge", seconds, started + worst, _peak_on_gpu(p.merge.plan.ops, on_gpu) if on_gpu else 0)


def merged_in(p: Prepared) -> torch.dtype:
    """The merged model's dtype; for `auto` the one that it usually chooses."""
    return expected_dtype(p.merge.plan.base.checkpoint, p.recipe.merge.dtype)


@dataclass(frozen=True, slots=True)
class Made:
    """GPU bytes of one tensor: peak while it is computed, the result, the rounded result."""

    making: int
    held: int
    rounded: int

    @classmethod
    def of(cls, p: Prepared, op: Op, device: torch.device, target: torch.dtype) -> Made:
        kept: list[torch.Tensor] = []
        making = cost_of(device, lambda: kept.append(compute(p.merge.plan, op, device)[0])).bytes
        (value,) = kept
        return cls(making, value.nbytes, 0 if value.dtype == target else value.numel() * target.itemsize)


def _peak_on_gpu(ops: Sequence[Op], made: Mapping[tuple[Any, ...], Made]) -> int:
    """Largest number of bytes that the merge holds on the GPU.

    One tensor is computed while the one before it is rounded and the one before that is written.
    """
    each = [made[op.shape, op.action] for op in ops]
    peak, written = each[0].making, 0
    for current, following in zip(each, [*each[1:], None], strict=True):
        peak = max(peak, current.held + current.rounded + written + (following.making if following else 0))
        written = current.rounded or current.held
    return peak


def _made(p: Prepared, op: Op, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return compute(p.merge.plan, op, device)[0].to(dtype)
