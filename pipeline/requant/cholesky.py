"""Cholesky factorization by several who hold the same matrix: each owns every so many-th block of columns. Tensors only.

Right-looking: the owner of a block finishes its columns, everybody gets them and takes them off the columns it owns. While
the others still do, the next owner is already at its next columns. Source: Golub & Van Loan, Matrix Computations, 4.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from requant import kernels

BLOCK = 1024

Publish = Callable[[Tensor, int], Callable[[], None]]
"""Starts to copy the owner's tensor into that of all others; returns what waits until it has arrived."""


def shared_cholesky(
    matrix: Tensor, rank: int, count: int, publish: Publish, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """As `torch.linalg.cholesky_ex`, with the same bits for all `count` who call it: matrix fp32 [n, n], which is used up.

    Returns (lower, info): info int64 [], not 0 when no factor was found; `lower` is then of no use.
    """
    n = len(matrix)
    parts = [slice(start, min(start + block, n)) for start in range(0, n, block)]
    with kernels.full_precision():  # a factor in TF32 would lose more than the damping adds
        arrived, coming = _begin(matrix, parts[0], 0, rank, count, publish)
        for number, here in enumerate(parts):
            arrived()
            panel = coming
            matrix[here.start :, here] = panel
            rest = [j for j in range(number + 1, len(parts)) if j % count == rank]
            if number + 1 < len(parts):
                if rest and rest[0] == number + 1:
                    _take_off(matrix, panel, here, parts[rest.pop(0)])
                arrived, coming = _begin(matrix, parts[number + 1], number + 1, rank, count, publish)
            for j in rest:
                _take_off(matrix, panel, here, parts[j])
    lower = matrix.tril_()
    return lower, (~torch.isfinite(lower.diagonal()).all()).long()


def _begin(
    matrix: Tensor, here: slice, number: int, rank: int, count: int, publish: Publish
) -> tuple[Callable[[], None], Tensor]:
    """Finish a block of columns if it is this one's, and have it published: (what waits for it, where it arrives)."""
    owner = number % count
    rows = matrix[here.start :, here]
    panel = _finished(rows) if owner == rank else rows.new_empty(rows.shape)
    return publish(panel, owner), panel


def _finished(rows: Tensor) -> Tensor:
    """Columns [m, k] from the diagonal down, with all before them taken off -> the factor's; NaN when there is none."""
    k = rows.shape[1]
    corner, info = torch.linalg.cholesky_ex(rows[:k])
    corner = torch.where(info == 0, corner, torch.nan).tril_()
    inverse = torch.linalg.solve_triangular(corner, torch.eye(k, device=rows.device), upper=False)
    return torch.cat([corner, rows[k:] @ inverse.T])


def _take_off(matrix: Tensor, panel: Tensor, here: slice, block: slice) -> None:
    """Subtract what the columns `here`, finished in `panel`, contribute to those of `block`."""
    below = panel[block.start - here.start :]
    matrix[block.start :, block].addmm_(below, below[: block.stop - block.start].T, alpha=-1)
