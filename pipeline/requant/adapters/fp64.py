"""The self-test's arithmetic: adapter tensors in fp64, and error bounds for fp32.

The formula of a kind is written twice in its file: `apply` in fp32 and in place, `exact_rows` in fp64 and row by row.
The second is the oracle of the first, so `exact_rows` uses the fold's fields and this file alone:
`tests/adapters/test_oracle.py` refuses a call of the fold's other methods or of `fold.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from requant.checkpoint.reader import TensorInfo, read_tensor

EPS = torch.finfo(torch.float32).eps


class Exact(NamedTuple):
    """Values in fp64, and how far correct fp32 code may be from each of them.

    The bound is a count of fp32 roundings times the sum of the magnitudes that they act on.
    """

    values: Tensor
    bound: Tensor


def read64(info: TensorInfo) -> Tensor:
    """One adapter tensor in fp64."""
    return read_tensor(info).double()


def add_product(rows: Tensor, left: Tensor, right: Tensor, scaling: float) -> Exact:
    """rows + scaling * left @ right."""
    size = rows.abs() + abs(scaling) * left.abs() @ right.abs()
    return Exact(rows + scaling * (left @ right), size * (left.shape[-1] + 4) * EPS)


def rows_in_turns(left: Tensor, turns: tuple[int, ...]) -> Tensor:
    """Rows [n, r] of one parameter, or of gate and up, where a file has them in turns; zeros in those of another.

    turns: as in `stacked_experts.Part`; (): they are in order.
    """
    if not turns:
        return left
    each = len(left) // len(turns)
    order = [turns.index(row % 2) * each + row // 2 if row % 2 in turns else len(left) for row in range(2 * each)]
    return torch.cat((left, left.new_zeros(1, left.shape[1])))[order]
