"""LoHa: W + s * (A1 @ B1) * (A2 @ B2), elementwise (arXiv:2108.06098)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from requant.adapters import fp64
from requant.adapters.fold import Fold, product_bound, read
from requant.adapters.module_tensors import ModuleTensors, parameters
from requant.checkpoint.reader import TensorInfo

TENSORS = parameters("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
SETTINGS = frozenset({
    "r", "alpha", "rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d", "init_weights",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
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

    def exact_rows(self, rows: Tensor, index: list[int]) -> fp64.Exact:
        a, b = [fp64.read64(t)[index] for t in self.a], [fp64.read64(t) for t in self.b]
        delta = self.scaling * (a[0] @ b[0]) * (a[1] @ b[1])
        size = abs(self.scaling) * (a[0].abs() @ b[0].abs()) * (a[1].abs() @ b[1].abs())
        return fp64.Exact(rows + delta, (rows.abs() + size) * (2 * b[0].shape[0] + 8) * fp64.EPS)


def build(tensors: ModuleTensors) -> Fold:
    """The LoHa of one linear layer.

    Raises InputError for a convolution, or when its tensors do not fit together.
    """
    module = tensors.module
    if "hada_t1" in tensors.found:
        raise tensors.error(f"{module} has hada_t1: LoHa on convolutions is not merged")
    a1, b1, a2, b2 = tensors.exactly("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    shapes = [(a.shape[0], b.shape[-1]) for a, b in ((a1, b1), (a2, b2)) if a.shape[-1] == b.shape[0]]
    if len(shapes) != 2 or shapes[0] != shapes[1]:
        raise tensors.error(
            f"{module}: {a1.shape} x {b1.shape} and {a2.shape} x {b2.shape} do not multiply to one shape"
        )
    return Loha(module=module, a=(a1, a2), b=(b1, b2), scaling=tensors.config.scaling(module))
