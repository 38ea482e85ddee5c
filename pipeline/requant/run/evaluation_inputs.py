"""What a recipe gives to the stage that scores: where variants are made from, dtype and batch."""

from __future__ import annotations

from pathlib import Path

import torch

from requant.evaluate.variants import Places
from requant.merge.stage import DTYPES
from requant.run.prepare import Prepared


def places(p: Prepared, run: Path) -> Places:
    """Where variants are made from, in the run directory `run`."""
    return Places(
        p.base, p.adapter, run / "merged", run / "gptq", p.simulate, p.quantize.grids, p.original_merge,
        p.recipe.trust_remote_code, p.merge, run / "healed", p.unheld is None,
    )  # fmt: skip


def dtype(p: Prepared, device: torch.device) -> torch.dtype:
    """The forward pass: fp32 on a CPU, the serving dtype on a GPU, unless asked otherwise."""
    asked = p.recipe.evaluate.dtype
    if asked != "auto":
        return DTYPES[asked]
    return torch.float32 if device.type == "cpu" else p.serving_dtype


def batch(p: Prepared, device: torch.device) -> int:
    """Windows at a time."""
    asked = p.recipe.evaluate.batch
    tokens = 2048 if device.type == "cpu" else 16384
    return max(1, tokens // p.sets[0].window) if asked == "auto" else asked
