"""IA3: a learned scale of inputs or outputs, W * l (arXiv:2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from requant.adapters import fp64
from requant.adapters.fold import Fold, read
from requant.adapters.module_tensors import ModuleTensors, parameters
from requant.checkpoint.reader import TensorInfo

TENSORS = parameters("ia3_l")
SETTINGS = frozenset({"feedforward_modules", "init_ia3_weights"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ia3(Fold):
    """IA3 of one module: a learned scale of each input or of each output.

    scale: [1, in] for feed-forward modules, else [out, 1], which also scales the bias.
    """

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

    def exact_rows(self, rows: Tensor, index: list[int]) -> fp64.Exact:
        scale = fp64.read64(self.scale)
        scale = scale.expand(-1, rows.shape[1]) if self.inputs else scale[index]
        return fp64.Exact(rows * scale, (rows * scale).abs() * 2 * fp64.EPS)

    @property
    def bias(self) -> Literal["if any"] | None:
        return None if self.inputs else "if any"

    def changed_bias(self, bias: Tensor) -> Tensor:
        return bias if self.inputs else bias * read(self.scale).reshape(-1)

    def exact_bias(self, value: Tensor, row: int) -> Tensor:
        return value if self.inputs else value * fp64.read64(self.scale).flatten()[row]


def build(tensors: ModuleTensors) -> Fold:
    """The IA3 scale of one module; raises InputError when it is neither a row nor a column."""
    (scale,) = tensors.exactly("ia3_l")
    if len(scale.shape) != 2 or 1 not in scale.shape:
        raise tensors.error(f"{tensors.module}: ia3_l has shape {scale.shape}, expected (1, in) or (out, 1)")
    return Ia3(module=tensors.module, scale=scale, inputs=scale.shape[0] == 1)
