"""Reopen a merged checkpoint and recompute random rows from base and adapter in fp64, by other code.

Shares no arithmetic with `nf4.decode` or `Fold.apply`: codes are looked up one row at a time in Python integers
and fp64, formulas are those of `selftest_twins`. The tolerance is derived: fp32 products and sums, then one rounding to the
stored dtype.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from requant.adapters.fold import Fold
from requant.adapters.ia3 import Ia3
from requant.adapters.lora import Lora
from requant.checkpoint.reader import Checkpoint, read_tensor
from requant.errors import StageError
from requant.merge import selftest_formulas as twins
from requant.merge.plan import MergePlan, Op
from requant.numerics import nf4

EPS = twins.EPS


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
    changed = [op for op in plan.ops if op.action != "copied"]
    sample = draw.sample(changed, min(tensors, len(changed)))
    worst, checked = 0.0, 0
    for op in sample:
        actual, exact_row = written.read(op.name), _rows(plan, op)
        kind = torch.finfo(written[op.name].dtype)
        for row in draw.sample(range(op.shape[0]), min(rows, op.shape[0])):
            exact, slack = exact_row(row)
            bound = slack + exact.abs() * kind.eps + kind.tiny * kind.eps  # half an ulp twice over, subnormals too
            share = float(((actual[row].double() - exact).abs() / bound).max())
            if not share <= 1:
                raise StageError(
                    f"{out}: {op.name} row {row} differs from base + adapter by {share:.3g} times the allowed rounding"
                )
            worst, checked = max(worst, share), checked + 1
    return SelfTest(len(sample), checked, worst)


def _rows(plan: MergePlan, op: Op) -> Callable[[int], tuple[Tensor, Tensor]]:
    """row -> (exact row in fp64, allowed fp32 arithmetic error) of one output tensor."""
    start = _start(plan, op)
    if op.bias_of:
        return lambda row: _bias(start(row), op.bias_of, row)
    if op.conv1d and op.folds:
        stored = torch.stack([start(i) for i in range(op.shape[0])]).T
        whole, slack = _folded(stored, op.folds, list(range(op.shape[1])))
        return lambda row: (whole[:, row], slack[:, row])

    def folded(row: int) -> tuple[Tensor, Tensor]:
        value = start(row)
        if not op.folds:
            return value, value.abs() * 4 * EPS
        exact, slack = _folded(value[None], op.folds, [row])
        return exact[0], slack[0]

    return folded


def _bias(value: Tensor, folds: tuple[Fold, ...], row: int) -> tuple[Tensor, Tensor]:
    """One element of a bias, fp64, and its slack."""
    size = value.abs()
    for fold in folds:
        if isinstance(fold, Ia3):
            value = value * read_tensor(fold.scale).double().flatten()[row]
        elif isinstance(fold, Lora) and fold.bias_delta is not None:
            value = value + fold.scaling * read_tensor(fold.bias_delta).double()[row]
        size = size + value.abs()
    return value, 2 * size * 4 * EPS


def _folded(rows: Tensor, folds: tuple[Fold, ...], index: list[int]) -> tuple[Tensor, Tensor]:
    """Fold into fp64 rows [n, columns], which are rows `index` of the weight; returns them and the slack."""
    slack = torch.zeros_like(rows)
    for fold in folds:
        rows, own = twins.folded(rows, fold, index)
        slack = slack + own
    return rows, slack


def _start(plan: MergePlan, op: Op) -> Callable[[int], Tensor]:
    """row -> the fp64 row that the adapter's delta is added to; packed ones are decoded element by element."""
    if op.replacement is not None:
        replaced = read_tensor(op.replacement)
        return lambda row: replaced[row].double()
    assert op.source is not None
    state = op.source.state
    if state is None or op.source.transposed:
        whole = plan.base.read(op.source.name)
        return lambda row: whole[row].double()
    data = plan.base.checkpoint.read(op.source.name).reshape(-1).view(torch.uint8)
    absmax = plan.base.absmax(op.source).double()
    values = nf4.table(state.quant_type).double().tolist()
    columns, blocksize = state.shape[-1], state.blocksize

    def decode(row: int) -> Tensor:
        out = []
        for e in range(row * columns, (row + 1) * columns):
            byte = int(data[e // 2])
            out.append(values[byte >> 4 if e % 2 == 0 else byte & 15] * float(absmax[e // blocksize]))
        return torch.tensor(out, dtype=torch.float64)

    return decode
