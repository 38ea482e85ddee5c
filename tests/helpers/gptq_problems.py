"""Weights, Hessians and solutions for tests of the solver."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from requant.numerics import gptq
from requant.numerics.grid import Grid
from requant.numerics.solution import Order

ROWS, COLUMNS = 48, 256


def problem(rows: int = ROWS, columns: int = COLUMNS, seed: int = 0, tokens: int = 2048) -> tuple[Tensor, Tensor]:
    """Weights and the Hessian of correlated inputs with a few loud channels, as in real models."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g) * 0.05
    mix = torch.randn(columns, columns, generator=g) / columns**0.5 + torch.eye(columns)
    loud = torch.ones(columns)
    loud[torch.randperm(columns, generator=g)[: columns // 16]] = 6.0
    inputs = torch.randn(tokens, columns, generator=g) @ mix * loud
    return weight, inputs.T @ inputs / tokens


def solved(weight: Tensor, hessian: Tensor, grid: Grid, order: Order, damp: float = 0.01, sweeps: int = 0) -> Any:
    columns = gptq.column_order(hessian.diagonal(), order, grid.group_size)
    factor = gptq.factorize(hessian, columns, damp)
    return gptq.quantize_weight(weight, hessian, factor, grid, order=order, sweeps=sweeps)
