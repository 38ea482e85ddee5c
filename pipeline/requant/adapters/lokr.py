"""LoKr: W + s * kron(W1, W2) (arXiv:2212.10650)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from requant.adapters.fold import Fold, Parts, _need, read
from requant.checkpoint.reader import TensorInfo
from requant.errors import InputError


@dataclass(frozen=True, slots=True)
class Lokr(Fold):
    """Kronecker product of w1 [a, b] and w2 [c, d]; either may be given as two factors to multiply."""

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
        one, two = ([read(t) for t in many] for many in (self.w1, self.w2))
        return (one[0] @ one[1] if len(one) == 2 else one[0]), (two[0] @ two[1] if len(two) == 2 else two[0])

    def apply(self, weight: Tensor) -> bool:
        one, two = self.matrices()
        weight.add_(torch.kron(one, two), alpha=self.scaling)
        return bool(one.any()) and bool(two.any())

    def bound(self, largest: float) -> float:
        one, two = self.matrices()
        return largest + abs(self.scaling) * float(one.abs().max() * two.abs().max())


def _lokr(module: str, found: Parts, scaling: float) -> Fold:
    if "lokr_t2" in found:
        raise InputError(f"{module} has lokr_t2: LoKr on convolutions is not merged")
    names = [("lokr_w1",) if "lokr_w1" in found else ("lokr_w1_a", "lokr_w1_b")]
    names.append(("lokr_w2",) if "lokr_w2" in found else ("lokr_w2_a", "lokr_w2_b"))
    tensors = _need(module, found, *names[0], *names[1])
    one, two = tensors[: len(names[0])], tensors[len(names[0]) :]
    for many in (one, two):
        if any(len(t.shape) != 2 for t in many) or (len(many) == 2 and many[0].shape[1] != many[1].shape[0]):
            raise InputError(f"{module}: {', '.join(str(t.shape) for t in many)} do not multiply")
    return Lokr(module, tuple(one), tuple(two), scaling)
