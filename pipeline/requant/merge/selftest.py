"""Self-test of a merged checkpoint: random rows, recomputed in fp64 by other code.

It shares no arithmetic with `nf4.decode` or `Fold.apply`: codes are looked up one row at a time in Python integers and
fp64, formulas are `Fold.exact_rows`. The tolerance is derived: fp32 products and sums, then one rounding to the stored
dtype.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from requant.adapters.fold import Fold
from requant.adapters.fp64 import EPS, Exact
from requant.checkpoint.reader import Checkpoint, read_tensor
from requant.errors import StageError
from requant.merge.plan import MergePlan, Op
from requant.merge.stage import read_base
from requant.merge.stored_dtype import own_dtype
from requant.numerics import nf4
from requant.numerics.dtypes import DTYPES


@dataclass(frozen=True)
class SelfTest:
    """Counts of what was recomputed, and the worst error as a share of its bound (at most 1)."""

    tensors: int
    rows: int
    worst: float


class SelfTestFacts(TypedDict):
    """A `SelfTest` as stored."""

    tensors: int
    rows: int
    worst: float


def self_test(plan: MergePlan, out: Path, *, tensors: int = 8, rows: int = 4, seed: int = 0) -> SelfTest:
    """Recompute random rows of random tensors and compare them with the file.

    Raises StageError that names the tensor and row that differ.
    """
    written = Checkpoint(out)
    plan = replace(plan, stored=DTYPES[own_dtype(written)])
    expected = {op.name for op in plan.ops}
    if set(written) != expected:
        raise StageError(f"{out}: holds {len(written)} tensors, the plan has {len(expected)}")
    draw = random.Random(seed)
    changed = [op for op in plan.ops if op.action != "copied" and (op.role == "parameter" or _is_packed(op))]
    sample = draw.sample(changed, min(tensors, len(changed)))
    worst, checked = 0.0, 0
    for op in sample:
        actual, exact_row = written.read(op.name), _exact_row(plan, op)
        kind = torch.finfo(written[op.name].dtype)
        for row in draw.sample(range(op.shape[0]), min(rows, op.shape[0])):
            exact, fp32_bound = exact_row(row)
            bound = fp32_bound + exact.abs() * kind.eps + kind.tiny * kind.eps  # half an ulp twice over, subnormals too
            share = float(((actual[row].double() - exact).abs() / bound).max())
            if not share <= 1:
                raise StageError(
                    f"{out}: {op.name} row {row} differs from base + adapter by {share:.3g} times the allowed rounding"
                )
            worst, checked = max(worst, share), checked + 1
    return SelfTest(len(sample), checked, worst)


def _is_packed(op: Op) -> bool:
    return op.source is not None and op.source.kind == "packed"


def _exact_row(plan: MergePlan, op: Op) -> Callable[[int], Exact]:
    """row -> the row of one output tensor in fp64, and how far fp32 may be from it."""
    base_row = _base_row(plan, op)
    if op.bias_folds:
        return lambda row: _bias(base_row(row), op.bias_folds, row)
    if op.conv1d and op.folds:
        stored = torch.stack([base_row(i) for i in range(op.shape[0])]).T
        whole, bound = _folded(stored, op.folds, list(range(op.shape[1])))
        return lambda row: Exact(whole[:, row], bound[:, row])

    def folded(row: int) -> Exact:
        value = base_row(row)
        if not op.folds:
            return Exact(value, value.abs() * 4 * EPS)
        exact, bound = _folded(value[None], op.folds, [row])
        return Exact(exact[0], bound[0])

    return folded


def _bias(value: Tensor, folds: tuple[Fold, ...], row: int) -> Exact:
    """One element of a bias."""
    size = value.abs()
    for fold in folds:
        value = fold.exact_bias(value, row)
        size = size + value.abs()
    return Exact(value, 2 * size * 4 * EPS)


def _folded(rows: Tensor, folds: tuple[Fold, ...], index: list[int]) -> Exact:
    """The folds of fp64 rows [n, columns], which are rows `index` of the weight."""
    bound = torch.zeros_like(rows)
    for fold in folds:
        rows, added = fold.exact_rows(rows, index)
        bound = bound + added
    return Exact(rows, bound)


def _base_row(plan: MergePlan, op: Op) -> Callable[[int], Tensor]:
    """Function from a row's number to the fp64 row that the adapter's delta is added to.

    Packed rows are decoded element by element.
    """
    if op.replacement is not None:
        replaced = read_tensor(op.replacement)
        return lambda row: replaced[row].double()
    assert op.source is not None
    state = op.source.state
    if state is None or op.source.transposed:
        whole = read_base(plan, op.source)
        return lambda row: whole[row].double()
    data = plan.base.checkpoint.read(op.source.name).reshape(-1).view(torch.uint8)
    absmax = plan.base.absmax(op.source).double()
    values = nf4.table(state.quant_type).double().tolist()
    columns, blocksize = state.shape[-1], state.blocksize
    casts = op.source.casts if op.source.folded_as_trained(plan.stored) else ()

    def decode(row: int) -> Tensor:
        out = []
        for e in range(row * columns, (row + 1) * columns):
            byte = int(data[e // 2])
            out.append(values[byte >> 4 if e % 2 == 0 else byte & 15] * float(absmax[e // blocksize]))
        exact = torch.tensor(out, dtype=torch.float64)
        for dtype in (torch.float32, *casts) if casts else ():  # the products are exact in fp64
            exact = exact.to(dtype)
        return exact.double()

    return decode
