"""What a healing changed: how far scales moved, how many codes are others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from requant.checkpoint.reader import Checkpoint
from requant.formats.registry import open_quantized

WORST = 10


class Changes(TypedDict):
    """Mean and quantiles of the relative changes of all scales. unchanged: share of the scales."""

    mean: float
    median: float
    p90: float
    p99: float
    max: float
    unchanged: float


class ModuleChange(TypedDict):
    """The mean relative change of one module's scales."""

    name: str
    mean: float


class ScaleChanges(TypedDict, total=False):
    """Relative changes of the scales.

    moved: over all scales. moved_most: the modules with the largest mean.
    """

    moved: Changes | None
    moved_most: list[ModuleChange]


class CodeChanges(TypedDict):
    """How many of the codes changed, and how far. share: of all codes. by: number of codes by distance, as text.

    most: the largest distance, in codes. modules: the largest shares.
    """

    share: float
    codes: int
    by: dict[str, int]
    most: int
    modules: list[ModuleChange]


def scale_changes(source: Path, values: Mapping[str, Tensor]) -> ScaleChanges:
    """Relative changes of the healed scales `values` from those of the checkpoint `source`."""
    checkpoint = Checkpoint(source)
    means, every = {}, []
    for name, value in values.items():
        if name.endswith(".scales"):
            change = (value.cpu() / checkpoint.read(name).float().T - 1).abs()
            every.append(change.flatten())
            means[name.removesuffix(".scales")] = float(change.mean())
    if not every:
        return {"moved": None, "moved_most": []}
    flat = torch.cat(every).sort().values
    at = {q: float(flat[min(len(flat) - 1, math.floor(q * len(flat)))]) for q in (0.5, 0.9, 0.99)}
    most = sorted(means, key=lambda n: -means[n])[:WORST]
    return {
        "moved": {
            "mean": float(flat.mean()),
            "median": at[0.5],
            "p90": at[0.9],
            "p99": at[0.99],
            "max": float(flat[-1]),
            "unchanged": float((flat == 0).float().mean()),
        },
        "moved_most": [{"name": name, "mean": means[name]} for name in most],
    }


def code_changes(source: Path, values: Mapping[str, Tensor]) -> CodeChanges | None:
    """How the healed codes in `values` differ from those of the checkpoint `source`; None where there are none."""
    reader, by, shares, total = open_quantized(source), Counter[int](), {}, 0
    for name, value in values.items():
        if name.endswith(".qweight"):
            stem = name.removesuffix(".qweight")
            distance = (value.int() - reader.unpack(f"{stem}.weight")[0].int()).abs()
            by.update({far: n for far, n in enumerate(distance.flatten().bincount().tolist()) if far and n})
            shares[stem] = float((distance > 0).float().mean())
            total += distance.numel()
    if not total:
        return None
    return {
        "share": by.total() / total,
        "codes": total,
        "by": {str(far): by[far] for far in sorted(by)},
        "most": max(by, default=0),
        "modules": [{"name": n, "mean": shares[n]} for n in sorted(shares, key=lambda n: -shares[n])[:WORST]],
    }
