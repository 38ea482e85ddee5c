"""Reopen a merged checkpoint and recompute random rows from base and adapter in fp64, by other code.

Shares no arithmetic with `nf4.decode` or `Fold.apply`: codes are looked up one row at a time in Python integers
and fp64. The tolerance is derived: fp32 products and sums, then one rounding to the stored dtype.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from requant import nf4
from requant.adapter import Fold
from requant.checkpoint import Checkpoint, read_tensor
from requant.dequantize import Base, Weight
from requant.errors import StageError
from requant.merge import MergePlan, Op


@dataclass(frozen=True)
class SelfTest:
    """How many rows of how many tensors were recomputed, and the worst error as a share of its bound (at most 1)."""

    tensors: int
    rows: int
    worst: float


def self_test(plan: MergePlan, out: Path, *, tensors: int = 8, rows: int = 4, seed: int = 0) -> SelfTest:
    """Compare `rows` random rows of `tensors` random tensors; raises StageError naming the tensor and row that differ."""
    written = Checkpoint(out)
    expected = {op.name for op in plan.ops}
    if set(written) != expected:
        raise StageError(f"{out}: holds {len(written)} tensors, the plan has {len(expected)}")
    draw = random.Random(seed)
    changed = [op for op in plan.ops if op.action != "copied" and len(op.shape) == 2]
    sample = draw.sample(changed, min(tensors, len(changed)))
    worst, checked = 0.0, 0
    for op in sample:
        actual = written.read(op.name).double()
        for row in draw.sample(range(op.shape[0]), min(rows, op.shape[0])):
            exact, slack = _row(plan, op, row)
            bound = (
                slack + exact.abs() * torch.finfo(written[op.name].dtype).eps + torch.finfo(written[op.name].dtype).tiny
            )
            share = float(((actual[row] - exact).abs() / bound).max())
            if not share <= 1:
                raise StageError(
                    f"{out}: {op.name} row {row} differs from base + adapter by {share:.3g} times the allowed rounding"
                )
            worst, checked = max(worst, share), checked + 1
    return SelfTest(len(sample), checked, worst)


def _row(plan: MergePlan, op: Op, row: int) -> tuple[Tensor, Tensor]:
    """(exact row in fp64, allowed fp32 arithmetic error) of one output tensor."""
    if op.replacement is not None:
        value = read_tensor(op.replacement)[row].double()
        return value, torch.zeros_like(value)
    assert op.source is not None
    if op.conv1d:
        whole, slack = _folded(plan.base.read(op.source.name).double().T, op.fold)
        return whole[:, row], slack[:, row]
    whole, slack = _folded(_base_row(plan.base, op.source, row)[None], op.fold, row)
    return whole[0], slack[0]


def _folded(rows: Tensor, fold: Fold | None, row: int | None = None) -> tuple[Tensor, Tensor]:
    """Fold into fp64 rows [n, columns]; `row` says which single row of the weight it is (None: all of them)."""
    eps = torch.finfo(torch.float32).eps
    slack = rows.abs() * 4 * eps
    if fold is None:
        return rows, slack
    left, right = (f.double() for f in fold.factors())
    left = left if row is None else left[row : row + 1]
    size = rows.abs() + abs(fold.scaling) * left.abs() @ right.abs()
    out, slack = rows + fold.scaling * (left @ right), size * (left.shape[1] + 4) * eps
    if fold.magnitude is None:
        return out, slack
    magnitude = read_tensor(fold.magnitude).double().reshape(-1, 1)
    scale = (magnitude if row is None else magnitude[row : row + 1]) / out.norm(dim=1, keepdim=True)
    return out * scale, slack * scale.abs() + (out * scale).abs() * (eps * 8 + eps * out.shape[1] ** 0.5)


def _base_row(base: Base, weight: Weight, row: int) -> Tensor:
    """One row of a base weight in fp64, element by element for packed ones."""
    if weight.kind != "packed":
        return base.read(weight.name)[row].double()
    assert weight.state is not None
    state = weight.state
    data = base.checkpoint.read(weight.name).reshape(-1).view(torch.uint8)
    absmax = base.absmax(weight).double().tolist()
    values = nf4.table(state.quant_type).double().tolist()
    columns = state.shape[-1]
    out = []
    for e in range(row * columns, (row + 1) * columns):
        byte = int(data[e // 2])
        out.append(values[byte >> 4 if e % 2 == 0 else byte & 15] * absmax[e // state.blocksize])
    return torch.tensor(out, dtype=torch.float64)
