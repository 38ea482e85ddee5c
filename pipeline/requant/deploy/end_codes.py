"""Codes of token embeddings and head that a source holds in 16 bit: rounded to nearest."""

from __future__ import annotations

import torch
from torch import Tensor

from requant.deploy.conversion_plan import ConversionPlan
from requant.errors import InputError
from requant.numerics.finite import all_finite
from requant.numerics.grid import Grid, Scales, round_to_grid, rounded_rows

ROWS = 2**14  # of a matrix that are compared at once


def rounded_end(planned: ConversionPlan, module: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [rows, width], scale and zero fp32 [rows, groups] of a matrix that its source holds in 16 bit.

    Raises InputError for values that are not finite.
    """
    weight = planned.plan.end_weights[module]
    values = planned.reader.checkpoint.read(weight)
    if not all_finite(values):
        raise InputError(f"{planned.reader.checkpoint.path}: {weight} has values that are not finite")
    codes, scales = rounded_rows(values, planned.plan.ends[module])
    return codes, scales.scale, scales.zero


def is_nearest(values: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> bool:
    """Whether every code is the nearest one to its value of any float dtype, by the scales that are stored."""
    for start in range(0, len(values), ROWS):
        rows = slice(start, start + ROWS)
        expected = round_to_grid(values[rows].float().contiguous(), Scales(scale[rows], zero[rows]), grid)
        if not torch.equal(expected, codes[rows]):
            return False
    return True
