"""Trained tokens: rows of an embedding replaced (PEFT's trainable tokens)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from requant.adapters.fold import Fold, read
from requant.checkpoint.reader import TensorInfo


@dataclass(frozen=True, slots=True)
class Rows(Fold):
    """Trained tokens: rows of an embedding (or of the tied head) that take the place of the base's."""

    indices: tuple[int, ...]
    rows: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return (-1, self.rows.shape[1])

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.rows,)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        last = max(self.indices, default=0)
        return f"token {last} is trained, the embedding has {shape[0]} rows" if last >= shape[0] else None

    def apply(self, weight: Tensor) -> bool:
        weight[list(self.indices)] = read(self.rows)
        return True

    def bound(self, largest: float) -> float:
        return max(largest, float(read(self.rows).abs().max()))
