"""The change of a stored tensor that is rows of several modules, or of one module a part.

Checkpoints hold as one matrix what a class has as several modules, such as q, k and v, and rows in another order. Or in
parts what a class has as one, such as gate and up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from requant.adapters import fp64
from requant.adapters.fold import Fold
from requant.checkpoint.reader import TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class SomeRows(Fold):
    """A fold of some rows of a weight, and of its bias.

    rows: their numbers in the weight, in the order of the module that `fold` changes. total: rows of the weight.
    """

    fold: Fold
    rows: Sequence[int]
    total: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.total, *self.fold.shape[1:])

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return self.fold.tensors

    def apply(self, weight: Tensor) -> bool:
        rows = list(self.rows)
        own = weight[rows]
        changed = self.fold.apply(own)
        weight[rows] = own
        return changed

    def bound(self, largest: float) -> float:
        return max(largest, self.fold.bound(largest))

    def exact_rows(self, rows: Tensor, index: list[int]) -> fp64.Exact:
        values, bound = rows.clone(), rows.abs() * fp64.EPS
        place = {row: number for number, row in enumerate(self.rows)}
        inside = [at for at, row in enumerate(index) if row in place]
        if inside:
            own = self.fold.exact_rows(rows[inside], [place[index[at]] for at in inside])
            values[inside], bound[inside] = own.values, own.bound
        return fp64.Exact(values, bound)

    def why_it_does_not_fit(self, shape: tuple[int, ...]) -> str | None:
        part, expected = (len(self.rows), *shape[1:]), self.fold.shape
        if any(e not in (-1, n) for e, n in zip(expected, part, strict=True)):
            return f"it changes a weight {list(expected)}, the base's part is {list(part)}"
        return self.fold.why_it_does_not_fit(part)

    @property
    def bias(self) -> Literal["needed", "if any"] | None:
        return self.fold.bias

    def changed_bias(self, bias: Tensor) -> Tensor:
        rows, changed = list(self.rows), bias.clone()
        changed[rows] = self.fold.changed_bias(bias[rows])
        return changed

    def exact_bias(self, value: Tensor, row: int) -> Tensor:
        return self.fold.exact_bias(value, self.rows.index(row)) if row in self.rows else value


@dataclass(frozen=True, slots=True, kw_only=True)
class PartOfModule(Fold):
    """A fold of a module with `total` rows, some of which are the weight.

    rows: their numbers in the module. A kind of adapter changes every row by itself, so that the others may be zero.
    """

    fold: Fold
    rows: range
    total: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.fold.shape[1:])

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return self.fold.tensors

    def apply(self, weight: Tensor) -> bool:
        whole = torch.zeros(self.total, *weight.shape[1:], dtype=weight.dtype, device=weight.device)
        part = whole[self.rows.start : self.rows.stop]
        part.copy_(weight)
        changed = self.fold.apply(whole)
        weight.copy_(part)
        return changed

    def bound(self, largest: float) -> float:
        return self.fold.bound(largest)

    def exact_rows(self, rows: Tensor, index: list[int]) -> fp64.Exact:
        return self.fold.exact_rows(rows, [self.rows[row] for row in index])

    def why_it_does_not_fit(self, shape: tuple[int, ...]) -> str | None:
        whole, expected = (self.total, *shape[1:]), self.fold.shape
        if any(e not in (-1, n) for e, n in zip(expected, whole, strict=True)):
            return f"it changes a weight {list(expected)}, the base's parts are {list(whole)} together"
        return self.fold.why_it_does_not_fit(whole)
