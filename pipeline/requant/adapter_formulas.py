"""How an adapter changes a weight: one small class a kind, all in fp32, nothing read until it is applied.

    lora     W + s * B @ A                      arXiv:2106.09685; rsLoRA arXiv:2312.03732
    dora     m * V / |V|,  V = W + s * B @ A    arXiv:2402.09353, by rows
    rows     W[i] = new                         PEFT's trainable tokens
    experts  W[e] + s * B[e] @ A[e]             PEFT's target_parameters on stacked experts

`W` is [out, in] throughout; Conv1D's transposed storage is the caller's business. PEFT 0.21 is the reference.
PEFT's other types are in `adapter_kinds`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from requant.checkpoint import TensorInfo, read_tensor


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


@dataclass(frozen=True, slots=True)
class Experts(Fold):
    """LoRA on stacked experts, PEFT's `target_parameters`, or on the slice of them that one stored tensor holds.

    `a` is [experts * r, in], expert after expert; `b` [out, r * experts], the expert changing fastest. expert: which one,
    None: all, stacked. transposed: PEFT took the parameter for [experts, in, out]. first, last: which rows of one
    expert's matrix, as it is stored, the tensor holds; last -1: all.
    """

    a: TensorInfo
    b: TensorInfo
    scaling: float
    experts: int
    transposed: bool
    expert: int | None = None
    first: int = 0
    last: int = -1

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.b.shape[0], self.a.shape[1]
        if self.transposed:
            rows, columns = columns, rows
        rows = rows if self.last < 0 else self.last - self.first
        return (rows, columns) if self.expert is not None else (self.experts, rows, columns)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.a, self.b)

    def factors(self, expert: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """(left [rows, r], right [r, columns]) of one expert as it is stored; `b` is `read_b()`."""
        rank = self.a.shape[0] // self.experts
        own_b, own_a = b[:, expert :: self.experts], read_rows(self.a, expert * rank, (expert + 1) * rank)
        if not self.transposed:
            return own_b, own_a
        return (own_a if self.last < 0 else own_a[:, self.first : self.last]).T, own_b.T

    def read_b(self) -> Tensor:
        """The rows of B that concern this tensor, fp32."""
        if self.transposed or self.last < 0:
            return read(self.b)
        return read_rows(self.b, self.first, self.last)

    def apply(self, weight: Tensor) -> bool:
        b, changed = self.read_b(), False
        for expert, target in [(self.expert, weight)] if self.expert is not None else enumerate(weight):
            left, right = self.factors(expert, b)
            target.addmm_(left, right, alpha=self.scaling)
            changed |= bool(left.any()) and bool(right.any())
        return changed

    def bound(self, largest: float) -> float:
        b = self.read_b()
        chosen = range(self.experts) if self.expert is None else (self.expert,)
        return largest + abs(self.scaling) * max(product_bound(*self.factors(e, b)) for e in chosen)


def product_bound(left: Tensor, right: Tensor) -> float:
    """Cauchy-Schwarz bound of max |left @ right|."""
    return float(torch.linalg.vector_norm(left, dim=1).max() * torch.linalg.vector_norm(right, dim=0).max())
