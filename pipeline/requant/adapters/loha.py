"""LoHa: W + s * (A1 @ B1) * (A2 @ B2), elementwise (arXiv:2108.06098)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from requant.adapters.fold import Fold, Parts, _need, product_bound, read
from requant.checkpoint.reader import TensorInfo
from requant.errors import InputError


@dataclass(frozen=True, slots=True)
class Loha(Fold):
    """Elementwise product of two low-rank products. `a` are [out, r], `b` [r, in]."""

    a: tuple[TensorInfo, TensorInfo]
    b: tuple[TensorInfo, TensorInfo]
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.a[0].shape[0], self.b[0].shape[1])

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (*self.a, *self.b)

    def apply(self, weight: Tensor) -> bool:
        one, two = (read(a) @ read(b) for a, b in zip(self.a, self.b, strict=True))
        delta = one.mul_(two).mul_(self.scaling)
        weight.add_(delta)
        return bool(delta.any())

    def bound(self, largest: float) -> float:
        one, two = (product_bound(read(a), read(b)) for a, b in zip(self.a, self.b, strict=True))
        return largest + abs(self.scaling) * one * two


def _loha(module: str, found: Parts, scaling: float) -> Fold:
    if "hada_t1" in found:
        raise InputError(f"{module} has hada_t1: LoHa on convolutions is not merged")
    a1, b1, a2, b2 = _need(module, found, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    shapes = [(a.shape[0], b.shape[-1]) for a, b in ((a1, b1), (a2, b2)) if a.shape[-1] == b.shape[0]]
    if len(shapes) != 2 or shapes[0] != shapes[1]:
        raise InputError(f"{module}: {a1.shape} x {b1.shape} and {a2.shape} x {b2.shape} do not multiply to one shape")
    return Loha(module, (a1, a2), (b1, b2), scaling)
