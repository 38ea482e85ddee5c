"""Fold: the change that an adapter makes to one weight, in fp32.

Each kind of adapter derives one class from `Fold`, with its formula, its shapes and its bound. Tensors are read
when `apply` is called. `W` is [out, in] throughout: the caller transposes Conv1D weights. PEFT 0.21 is the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from requant.adapters.fp64 import Exact
from requant.checkpoint.reader import TensorInfo, read_tensor


def read(info: TensorInfo) -> Tensor:
    """One adapter tensor in fp32."""
    return read_tensor(info).float()


def read_rows(info: TensorInfo, start: int, stop: int) -> Tensor:
    """Rows start..stop of a 2-D adapter tensor in fp32; the other rows are not read."""
    return read(info.rows(start, stop))


def product_bound(left: Tensor, right: Tensor) -> float:
    """Cauchy-Schwarz bound of max |left @ right|."""
    return float(torch.linalg.vector_norm(left, dim=1).max() * torch.linalg.vector_norm(right, dim=0).max())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """Base class of the adapter kinds: the change of one module's weight and bias.

    on_any_device: whether `apply` takes a weight on any device; by default it is called with weights on the CPU.
    """

    on_any_device: ClassVar[bool] = False
    module: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight; -1 where the adapter's tensors do not determine it."""
        raise NotImplementedError

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The adapter tensors that the fold uses; shared ones are not counted."""
        raise NotImplementedError

    def apply(self, weight: Tensor) -> bool:
        """Change `weight` (fp32) in place; returns False when the adapter's change is exactly zero."""
        raise NotImplementedError

    def bound(self, largest: float) -> float:
        """Upper bound of max |W| after `apply`, given the one before."""
        raise NotImplementedError

    def exact_rows(self, rows: Tensor, index: list[int]) -> Exact:
        """The change of fp64 `rows` [n, columns], the oracle of `apply`.

        index: the numbers of these rows in the weight.
        A stacked weight [experts, rows, columns] gives rows [n, rows, columns].
        """
        raise NotImplementedError

    def why_it_does_not_fit(self, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this shape cannot be changed, beyond a wrong `shape`; None: it can."""
        return None

    @property
    def bias(self) -> Literal["needed", "if any"] | None:
        """Whether the module's bias changes too: `needed` is an error without a bias in the base."""
        return None

    def changed_bias(self, bias: Tensor) -> Tensor:
        """The module's bias, fp32, after the change."""
        return bias

    def exact_bias(self, value: Tensor, row: int) -> Tensor:
        """The change of element `row` of the bias in fp64: the oracle of `changed_bias`."""
        return value
