"""Blocked Cholesky factorization, shared by several ranks, and blocked solves.

Right-looking: the owner of a block of columns finishes it and broadcasts it, and every rank subtracts it from the
columns that it owns. The next owner subtracts from its next block first and finishes that, while the other ranks still
subtract.
Source: Golub & Van Loan, Matrix Computations, 4.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from requant.numerics import matmul_precision
from requant.numerics.blocks import blocks_of

BLOCK = 1024
CORNER = 64  # triangles up to this size are inverted by substitution, larger ones by products of halves

Publish = Callable[[Tensor, int], Callable[[], None]]
"""Start to broadcast the owner's tensor; returns a function that waits until it has arrived."""


def shared_cholesky(
    matrix: Tensor, rank: int, count: int, publish: Publish, block: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """`torch.linalg.cholesky_ex` computed by `count` ranks together, with the same bits on each.

    matrix: fp32 [n, n], overwritten.
    Returns (lower, info): info int64 [], not 0 when no factor was found; `lower` is then of no use.
    """
    n = len(matrix)
    parts = blocks_of(n, block)
    with matmul_precision.full_precision():  # a factor in TF32 would lose more than the damping adds
        arrived, coming = _begin(matrix, parts[0], 0, rank, count, publish)
        for number, here in enumerate(parts):
            arrived()
            panel = coming
            matrix[here.start :, here] = panel
            rest = [j for j in range(number + 1, len(parts)) if j % count == rank]
            if number + 1 < len(parts):
                if rest and rest[0] == number + 1:
                    _subtract_panel(matrix, panel, here, parts[rest.pop(0)])
                arrived, coming = _begin(matrix, parts[number + 1], number + 1, rank, count, publish)
            for j in rest:
                _subtract_panel(matrix, panel, here, parts[j])
    lower = matrix.tril_()
    return lower, (~torch.isfinite(lower.diagonal()).all()).long()


def _begin(
    matrix: Tensor, here: slice, number: int, rank: int, count: int, publish: Publish
) -> tuple[Callable[[], None], Tensor]:
    """Finish a block of columns if this rank owns it, and start its broadcast.

    Returns (a function that waits for it, the tensor in which it arrives).
    """
    owner = number % count
    rows = matrix[here.start :, here]
    panel = _finished(rows) if owner == rank else rows.new_empty(rows.shape)
    return publish(panel, owner), panel


def _finished(rows: Tensor) -> Tensor:
    """Columns [m, k] of the factor, of columns from which all earlier ones are subtracted.

    rows: from the diagonal down. NaN when there is no factor.
    """
    k = rows.shape[1]
    corner, info = torch.linalg.cholesky_ex(rows[:k])
    corner = torch.where(info == 0, corner, torch.nan).tril_()
    return torch.cat([corner, rows[k:] @ inverses(corner, k)[0].T])


def _subtract_panel(matrix: Tensor, panel: Tensor, here: slice, block: slice) -> None:
    """Subtract what the columns `here`, finished in `panel`, contribute to those of `block`."""
    below = panel[block.start - here.start :]
    matrix[block.start :, block].addmm_(below, below[: block.stop - block.start].T, alpha=-1)


def solve(lower: Tensor, columns: Tensor, block: int = BLOCK) -> Tensor:
    """(lower @ lower.T)^-1 @ columns, as `torch.cholesky_solve`.

    lower: fp32 [n, n]. columns: fp32 [n, k], overwritten.
    Products of many rows, except in the corners. With few columns a GPU's library takes half as long again
    (bench/factors.py).
    """
    with matmul_precision.full_precision():  # in TF32 substitution passes its errors on
        return substitute(lower, columns, block)


def substitute(lower: Tensor, columns: Tensor, block: int = BLOCK) -> Tensor:
    """`solve` in the current precision of fp32 products.

    The precision belongs to the process: no other thread may change it meanwhile.
    """
    parts = blocks_of(len(lower), block)
    corners = inverses(lower, block)
    for corner, here in zip(corners, parts, strict=True):
        columns[here] = _unpadded(corner, here) @ columns[here]
        columns[here.stop :].addmm_(lower[here.stop :, here], columns[here], alpha=-1)
    for corner, here in reversed(list(zip(corners, parts, strict=True))):
        columns[here] = _unpadded(corner, here).T @ columns[here]
        columns[: here.start].addmm_(lower[here, : here.start].T, columns[here], alpha=-1)
    return columns


def inverses(lower: Tensor, block: int) -> Tensor:
    """Inverses of the triangles on the diagonal of `lower` [n, n], fp32 [blocks, block, block].

    The last one is padded with ones on its diagonal.

    By halves: that of [[A, 0], [C, D]] is [[A^-1, 0], [-D^-1 C A^-1, D^-1]].
    """
    parts, rest, size = blocks_of(len(lower), block), -len(lower) % block, block
    while size % 2 == 0 and size > CORNER:
        size //= 2
    out = lower.new_zeros(len(parts), block, block)
    for corner, here in zip(out, parts, strict=True):
        _unpadded(corner, here).copy_(lower[here, here])
    if rest:
        out[-1].diagonal()[-rest:] = 1
    smallest = _on_diagonal(out, size)
    smallest.copy_(torch.linalg.solve_triangular(smallest, torch.eye(size, device=lower.device), upper=False))
    while size < block:
        both = _on_diagonal(out, 2 * size)
        first, second, below = both[..., :size, :size], both[..., size:, size:], both[..., size:, :size]
        below.copy_(-(second @ (below @ first)))
        size *= 2
    return out


def _on_diagonal(matrices: Tensor, size: int) -> Tensor:
    """A view of the blocks on the diagonal of each [k, k] matrix: [count, k / size, size, size]."""
    count, k, _ = matrices.shape
    return matrices.view(count, k // size, size, k // size, size).diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _unpadded(corner: Tensor, here: slice) -> Tensor:
    """A corner without its padding."""
    return corner[: here.stop - here.start, : here.stop - here.start]
