"""Solving with a Cholesky factor on tensor cores: nearly all of the work is products of blocks. Tensors only.

Left-looking, a block of unknowns at a time: what the known ones contribute is taken off in one product, and the block's
own triangle, inverted in fp32, does the rest. Source: Golub & Van Loan, Matrix Computations, 3.1.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from requant import products

BLOCK = 1024


def cholesky_solve(columns: Tensor, lower: Tensor, block: int = BLOCK) -> Tensor:
    """(lower @ lower.T)^-1 @ columns, fp32 [n, k], as torch's function of that name; `columns` is used up.

    lower: fp32 [n, n]; what lies above its diagonal is not looked at.
    """
    if not products.has_parts(columns):
        return torch.cholesky_solve(columns, lower)
    return by_parts(columns, lower, block)


def by_parts(columns: Tensor, lower: Tensor, block: int = BLOCK) -> Tensor:
    """The same in products in parts wherever it is."""
    n = len(lower)
    cuts = [*range(0, n, block), n]
    here = [slice(a, b) for a, b in pairwise(cuts)]
    with products.full_precision():
        inverses = [_inverse(lower[own, own]) for own in here]
    high, low = torch.empty_like(columns), torch.empty_like(columns)
    for own, inverse in zip(here, inverses, strict=True):
        _step(columns, high, low, own, slice(0, own.start), lower[own, : own.start], inverse)
    for own, inverse in zip(reversed(here), reversed(inverses), strict=True):
        _step(columns, high, low, own, slice(own.stop, n), lower[own.stop :, own].T, inverse.T)
    return columns


def _step(
    columns: Tensor, high: Tensor, low: Tensor, own: slice, known: slice, coupling: Tensor, inverse: Tensor
) -> None:
    """Solve for the rows `own` of `columns`, given those in `known`; high and low: the parts of all that is solved."""
    mine = columns[own]
    if coupling.numel():
        products.add_product(mine, products.parts(coupling), (high[known], low[known]), sign=-1)
    wanted = products.parts(mine)
    products.add_product(mine.zero_(), products.parts(inverse), wanted)
    high[own], low[own] = products.parts(mine)


def _inverse(corner: Tensor) -> Tensor:
    inverse: Tensor = torch.linalg.solve_triangular(corner, torch.eye(len(corner), device=corner.device), upper=False)
    return inverse
