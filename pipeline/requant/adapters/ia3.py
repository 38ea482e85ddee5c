"""IA3: a learned scale of inputs or outputs, W * l (arXiv:2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from requant.adapters.fold import Fold, Parts, _need, read
from requant.checkpoint.reader import TensorInfo
from requant.errors import InputError


@dataclass(frozen=True, slots=True)
class Ia3(Fold):
    """A learned scale of each input (feed-forward modules, [1, in]) or of each output, bias too ([out, 1])."""

    scale: TensorInfo
    inputs: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The scaled dimension only; -1 is any."""
        return (-1, self.scale.shape[1]) if self.inputs else (self.scale.shape[0], -1)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.scale,)

    def apply(self, weight: Tensor) -> bool:
        scale = read(self.scale)
        weight.mul_(scale)
        return bool((scale != 1).any())

    def bound(self, largest: float) -> float:
        return largest * float(read(self.scale).abs().max())

    @property
    def bias(self) -> str | None:
        return None if self.inputs else "if any"

    def changed_bias(self, bias: Tensor) -> Tensor:
        return bias if self.inputs else bias * read(self.scale).reshape(-1)


def _ia3(module: str, found: Parts) -> Fold:
    (scale,) = _need(module, found, "ia3_l")
    if len(scale.shape) != 2 or 1 not in scale.shape:
        raise InputError(f"{module}: ia3_l has shape {scale.shape}, expected (1, in) or (out, 1)")
    return Ia3(module, scale, inputs=scale.shape[0] == 1)
