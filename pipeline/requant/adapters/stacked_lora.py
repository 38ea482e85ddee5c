"""LoRA on stacked experts: W[e] + s * B[e] @ A[e] (PEFT's target_parameters)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from requant.adapters.fold import Fold, product_bound, read, read_rows
from requant.checkpoint.reader import TensorInfo


@dataclass(frozen=True, slots=True)
class Experts(Fold):
    """LoRA on stacked experts, PEFT's `target_parameters`, or on the slice of them that one stored tensor holds.

    `a` is [experts * r, in], expert after expert; `b` [out, r * experts], the expert changing fastest. expert: which one,
    None: all, stacked. transposed: PEFT took the parameter for [experts, in, out]. first, last: which rows of one
    expert's matrix, as it is stored, the tensor holds; last -1: all.
    """

    a: TensorInfo
    b: TensorInfo
    scaling: float
    experts: int
    transposed: bool
    expert: int | None = None
    first: int = 0
    last: int = -1

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.b.shape[0], self.a.shape[1]
        if self.transposed:
            rows, columns = columns, rows
        rows = rows if self.last < 0 else self.last - self.first
        return (rows, columns) if self.expert is not None else (self.experts, rows, columns)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.a, self.b)

    def factors(self, expert: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """(left [rows, r], right [r, columns]) of one expert as it is stored; `b` is `read_b()`."""
        rank = self.a.shape[0] // self.experts
        own_b, own_a = b[:, expert :: self.experts], read_rows(self.a, expert * rank, (expert + 1) * rank)
        if not self.transposed:
            return own_b, own_a
        return (own_a if self.last < 0 else own_a[:, self.first : self.last]).T, own_b.T

    def read_b(self) -> Tensor:
        """The rows of B that concern this tensor, fp32."""
        if self.transposed or self.last < 0:
            return read(self.b)
        return read_rows(self.b, self.first, self.last)

    def apply(self, weight: Tensor) -> bool:
        b, changed = self.read_b(), False
        for expert, target in [(self.expert, weight)] if self.expert is not None else enumerate(weight):
            left, right = self.factors(expert, b)
            target.addmm_(left, right, alpha=self.scaling)
            changed |= bool(left.any()) and bool(right.any())
        return changed

    def bound(self, largest: float) -> float:
        b = self.read_b()
        chosen = range(self.experts) if self.expert is None else (self.expert,)
        return largest + abs(self.scaling) * max(product_bound(*self.factors(e, b)) for e in chosen)
