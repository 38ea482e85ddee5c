"""LoKr: W + s * kron(W1, W2) (arXiv:2212.10650)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from requant.adapters import fp64
from requant.adapters.fold import Fold, read
from requant.adapters.module_tensors import ModuleTensors, parameters
from requant.checkpoint.reader import TensorInfo

TENSORS = parameters("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
SETTINGS = frozenset({
    "r", "alpha", "rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d", "init_weights",
    "decompose_both", "decompose_factor",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Lokr(Fold):
    """LoKr of one linear layer: the Kronecker product of w1 [a, b] and w2 [c, d].

    Either may be stored as two factors to multiply.
    """

    w1: tuple[TensorInfo, ...]
    w2: tuple[TensorInfo, ...]
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        return (
            self.w1[0].shape[0] * self.w2[0].shape[0],
            self.w1[-1].shape[1] * self.w2[-1].shape[1],
        )

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (*self.w1, *self.w2)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """(w1, w2) in fp32, multiplied out."""
        one, two = ([read(t) for t in factors] for factors in (self.w1, self.w2))
        return (one[0] @ one[1] if len(one) == 2 else one[0]), (two[0] @ two[1] if len(two) == 2 else two[0])

    def apply(self, weight: Tensor) -> bool:
        one, two = self.matrices()
        weight.add_(torch.kron(one, two), alpha=self.scaling)
        return bool(one.any()) and bool(two.any())

    def bound(self, largest: float) -> float:
        one, two = self.matrices()
        return largest + abs(self.scaling) * float(one.abs().max() * two.abs().max())

    def exact_rows(self, rows: Tensor, index: list[int]) -> fp64.Exact:
        one, two = ([fp64.read64(t) for t in factors] for factors in (self.w1, self.w2))
        terms = sum(factors[0].shape[1] for factors in (one, two) if len(factors) == 2)
        height = two[0].shape[0]
        w1, w2 = (m[0] @ m[1] if len(m) == 2 else m[0] for m in (one, two))
        s1, s2 = (m[0].abs() @ m[1].abs() if len(m) == 2 else m[0].abs() for m in (one, two))
        delta = torch.stack([torch.cat([v * w2[i % height] for v in w1[i // height]]) for i in index])
        size = torch.stack([torch.cat([v * s2[i % height] for v in s1[i // height]]) for i in index])
        bound = (rows.abs() + abs(self.scaling) * size) * (terms + 8) * fp64.EPS
        return fp64.Exact(rows + self.scaling * delta, bound)


def build(tensors: ModuleTensors) -> Fold:
    """The LoKr of one linear layer.

    Raises InputError for a convolution, or when its tensors do not fit together.
    """
    module, found = tensors.module, tensors.found
    if "lokr_t2" in found:
        raise tensors.error(f"{module} has lokr_t2: LoKr on convolutions is not merged")
    names = [("lokr_w1",) if "lokr_w1" in found else ("lokr_w1_a", "lokr_w1_b")]
    names.append(("lokr_w2",) if "lokr_w2" in found else ("lokr_w2_a", "lokr_w2_b"))
    every = tensors.exactly(*names[0], *names[1])
    one, two = every[: len(names[0])], every[len(names[0]) :]
    for factors in (one, two):
        if any(len(t.shape) != 2 for t in factors) or (
            len(factors) == 2 and factors[0].shape[1] != factors[1].shape[0]
        ):
            raise tensors.error(f"{module}: {', '.join(str(t.shape) for t in factors)} do not multiply")
    return Lokr(module=module, w1=tuple(one), w2=tuple(two), scaling=tensors.config.scaling(module))
