"""LoRA, rsLoRA and DoRA: W + s * B @ A (arXiv:2106.09685, 2312.03732, 2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from requant.adapters.fold import Fold, product_bound, read
from requant.checkpoint.reader import TensorInfo


@dataclass(frozen=True, slots=True)
class Lora(Fold):
    """LoRA, rsLoRA and DoRA. `a` is [r, in] and `b` [out, r]; for an embedding [r, vocabulary] and [width, r]."""

    a: TensorInfo
    b: TensorInfo
    scaling: float
    magnitude: TensorInfo | None = None
    bias_delta: TensorInfo | None = None
    embedding: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (columns, rows) if self.embedding else (rows, columns)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return tuple(t for t in (self.a, self.b, self.magnitude, self.bias_delta) if t is not None)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(left [rows, r], right [r, columns]) in fp32: the delta is `scaling * left @ right`."""
        a, b = read(self.a), read(self.b)
        return (a.T.contiguous(), b.T.contiguous()) if self.embedding else (b, a)

    def apply(self, weight: Tensor) -> bool:
        left, right = (factor.to(weight.device) for factor in self.factors())
        weight.addmm_(left, right, alpha=self.scaling)
        if self.magnitude is None:
            return bool(left.any()) and bool(right.any())
        magnitude = read(self.magnitude).reshape(-1, 1).to(weight.device)
        weight.mul_(magnitude / torch.linalg.vector_norm(weight, dim=1, keepdim=True))
        return True

    def bound(self, largest: float) -> float:
        if self.magnitude is not None:
            return float(read(self.magnitude).abs().max())
        left, right = self.factors()
        return largest + abs(self.scaling) * product_bound(left, right)

    @property
    def bias(self) -> str | None:
        return "needed" if self.bias_delta else None

    def changed_bias(self, bias: Tensor) -> Tensor:
        return bias if self.bias_delta is None else bias + self.scaling * read(self.bias_delta)
