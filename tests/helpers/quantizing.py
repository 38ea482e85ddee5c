"""A small model quantized by the stage itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from helpers import pico
from requant.numerics.grid import Grid
from requant.quantize.plan import Settings
from requant.quantize.stage import quantize

GRID = Grid(4, 32)
CPU = torch.device("cpu")


def windows(count: int = 8, length: int = 32) -> Tensor:
    return pico.ids(count, length, seed=3)


def model_dir(tmp: Path, kind: str = "llama", **changes: Any) -> Path:
    return pico.save(pico.model(kind, **changes), tmp / "merged", torch.float16)


def run(source: Path, out: Path, settings: Settings | None = None, **options: Any) -> Any:
    out.mkdir(exist_ok=True)
    options = {"dtype": torch.float16, "device": CPU, "batch": 2} | options
    function = options.pop("function", quantize)
    return function(source, out, options.pop("windows", windows()), settings or Settings(grid=GRID), **options)
