"""The change of some rows of a stored tensor, by a fold of the module that they are.

Checkpoints hold as one matrix what a class has as several modules, such as q, k and v, and rows in another order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
