"""How an adapter changes a weight: one small class a kind, all in fp32, nothing read until it is applied.

    lora     W + s * B @ A                      arXiv:2106.09685; rsLoRA arXiv:2312.03732
    dora     m * V / |V|,  V = W + s * B @ A    arXiv:2402.09353, by rows
    rows     W[i] = new                         PEFT's trainable tokens
    experts  W[e] + s * B[e] @ A[e]             PEFT's target_parameters on stacked experts

`W` is [out, in] throughout; Conv1D's transposed storage is the caller's business. PEFT 0.21 is the reference.
PEFT's other types are in `adapter_kinds`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from requant.checkpoint.reader import TensorInfo, read_tensor
from requant.errors import InputError


def read(info: TensorInfo) -> Tensor:
    """One adapter tensor in fp32."""
    return read_tensor(info).float()


def read_rows(info: TensorInfo, start: int, stop: int) -> Tensor:
    """Rows start..stop of a 2-D adapter tensor in fp32, without reading the others."""
    row = info.nbytes // info.shape[0]
    shape = (stop - start, *info.shape[1:])
    return read(TensorInfo(info.name, info.dtype, shape, info.file, info.offset + start * row, (stop - start) * row))


@dataclass(frozen=True, slots=True)
class Fold:
    """What every kind has: the module it changes and its tensors; `apply` changes `weight` (fp32) in place.

    `apply` returns whether the adapter says to change anything; `bound(largest)` is an upper bound of the result's
    largest magnitude, given the weight's; `misfit` says why a weight of this shape cannot be folded into, if so.
    """

    module: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it folds into; -1 where the adapter does not say."""
        raise NotImplementedError

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        raise NotImplementedError

    def apply(self, weight: Tensor) -> bool:
        raise NotImplementedError

    def bound(self, largest: float) -> float:
        raise NotImplementedError

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return None

    @property
    def bias(self) -> str | None:
        """`needed`: the base must have a bias to change; `if any`: it is changed where there is one."""
        return None

    def changed_bias(self, bias: Tensor) -> Tensor:
        """The module's bias, fp32, as this kind makes it."""
        return bias


def product_bound(left: Tensor, right: Tensor) -> float:
    """Cauchy-Schwarz bound of max |left @ right|."""
    return float(torch.linalg.vector_norm(left, dim=1).max() * torch.linalg.vector_norm(right, dim=0).max())


Parts = Mapping[str, TensorInfo]


def _need(module: str, found: Parts, *names: str) -> list[TensorInfo]:
    """These tensors of a module, all 2-D, and no others."""
    lost, extra = sorted(set(names) - set(found)), sorted(set(found) - set(names))
    if lost or extra:
        raise InputError(f"{module} has {', '.join(sorted(found))}; expected {', '.join(names)}")
    return [found[n] for n in names]
