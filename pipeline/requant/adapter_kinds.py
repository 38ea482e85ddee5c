"""PEFT's types other than LoRA that a weight can absorb: their formulas, and how their tensors are read from the file.

loha     W + s * (A1 @ B1) * (A2 @ B2)      arXiv:2108.06098, elementwise product
lokr     W + s * kron(W1, W2)               arXiv:2212.10650
vera     W + diag(b) @ B @ diag(d) @ A      arXiv:2310.11454, A and B shared by all modules and cut to size
ia3      W * l                              arXiv:2205.05638, l scales inputs or outputs
oft      W @ R'                             arXiv:2306.07280, R block-diagonal, near orthogonal
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from requant.adapter_formulas import Fold, product_bound, read, read_rows
from requant.checkpoint import TensorInfo
from requant.errors import InputError

Parts = Mapping[str, TensorInfo]
NEEDS = {"LOHA": "hada_w1_a", "LOKR": "lokr_w", "VERA": "vera_lambda_b", "IA3": "ia3_l", "OFT": "oft_R"}
"""peft_type -> the tensor that every adapted module of that type has."""


@dataclass(frozen=True, slots=True)
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


@dataclass(frozen=True, slots=True)
class Vera(Fold):
    """Two vectors between projections shared by the whole adapter: `a` [r, >= in] and `b` [>= out, r], cut to size."""

    a: TensorInfo
    b: TensorInfo
    lambda_b: TensorInfo
    lambda_d: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.lambda_b.shape[0], -1)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.lambda_b, self.lambda_d)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        have = self.a.shape[1]
        return f"vera_A is for {have} inputs at most, the base has {shape[1]}" if shape[1] > have else None

    def factors(self, columns: int) -> tuple[Tensor, Tensor]:
        """(left [out, r], right [r, columns]) in fp32: the delta is `left @ right`."""
        rank = self.lambda_d.shape[0]
        left = read_rows(self.b, 0, self.lambda_b.shape[0])[:, :rank] * read(self.lambda_b)[:, None]
        return left, read(self.a)[:rank, :columns] * read(self.lambda_d)[:, None]

    def apply(self, weight: Tensor) -> bool:
        left, right = self.factors(weight.shape[1])
        weight.addmm_(left, right)
        return bool(left.any()) and bool(right.any())

    def bound(self, largest: float) -> float:
        return largest + product_bound(*self.factors(self.a.shape[1]))


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


@dataclass(frozen=True, slots=True)
class Oft(Fold):
    """A rotation of the inputs in blocks: `vectors` [blocks or 1, b (b - 1) / 2] are skew-symmetric matrices' upper halves.

    terms: of the Neumann series that PEFT takes for the Cayley transform; None: the transform itself.
    """

    vectors: TensorInfo
    block: int
    columns: int
    terms: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return (-1, self.columns)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.vectors,)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return f"{shape[1]} inputs do not divide into blocks of {self.block}" if shape[1] % self.block else None

    def rotations(self) -> Tensor:
        """fp32 [blocks or 1, block, block]."""
        vectors = read(self.vectors)
        skew = torch.zeros(len(vectors), self.block, self.block)
        rows, columns = torch.triu_indices(self.block, self.block, 1)
        skew[:, rows, columns] = vectors
        skew = skew - skew.transpose(1, 2)
        eye = torch.eye(self.block).expand_as(skew)
        if self.terms is None:
            exact: Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
            return exact
        total, power = eye.clone(), eye
        for term in range(1, self.terms):
            power = power @ skew
            total += power * (1 if term == self.terms - 1 and term > 1 else 2)
        return total

    def apply(self, weight: Tensor) -> bool:
        rotations = self.rotations()
        blocks = weight.reshape(weight.shape[0], -1, self.block)
        rotated = torch.einsum("orc,rkc->ork", blocks, rotations.expand(blocks.shape[1], -1, -1))
        weight.copy_(rotated.reshape(weight.shape))
        return bool(read(self.vectors).any())

    def bound(self, largest: float) -> float:
        return largest * float(self.rotations().abs().sum(dim=2).max())


def build(kind: str, config: Mapping[str, Any], module: str, found: Parts, shared: Parts, scaling: float) -> Fold:
    """One module's fold of a peft_type in NEEDS; raises InputError when tensors are missing or do not fit together.

    shared: the tensors of no module, VeRA's projections. scaling: alpha / r where the type has one.
    """
    if kind == "LOHA":
        return _loha(module, found, scaling)
    if kind == "LOKR":
        return _lokr(module, found, scaling)
    if kind == "VERA":
        return _vera(module, found, shared)
    if kind == "IA3":
        return _ia3(module, found)
    return _oft(config, module, found)


def _need(module: str, found: Parts, *names: str) -> list[TensorInfo]:
    """These tensors of a module, all 2-D, and no others."""
    lost, extra = sorted(set(names) - set(found)), sorted(set(found) - set(names))
    if lost or extra:
        raise InputError(f"{module} has {', '.join(sorted(found))}; expected {', '.join(names)}")
    return [found[n] for n in names]


def _loha(module: str, found: Parts, scaling: float) -> Fold:
    if "hada_t1" in found:
        raise InputError(f"{module} has hada_t1: LoHa on convolutions is not merged")
    a1, b1, a2, b2 = _need(module, found, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    shapes = [(a.shape[0], b.shape[-1]) for a, b in ((a1, b1), (a2, b2)) if a.shape[-1] == b.shape[0]]
    if len(shapes) != 2 or shapes[0] != shapes[1]:
        raise InputError(f"{module}: {a1.shape} x {b1.shape} and {a2.shape} x {b2.shape} do not multiply to one shape")
    return Loha(module, (a1, a2), (b1, b2), scaling)


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


def _vera(module: str, found: Parts, shared: Parts) -> Fold:
    lambda_b, lambda_d = _need(module, found, "vera_lambda_b", "vera_lambda_d")
    if not {"vera_A", "vera_B"} <= set(shared):
        raise InputError(
            "save_projection was false: vera_A and vera_B are not in the file, and PEFT draws them anew from a seed whose "
            "numbers depend on the machine. Load the adapter where it was trained, set save_projection and save it again"
        )
    a, b = shared["vera_A"], shared["vera_B"]
    if b.shape[0] < lambda_b.shape[0] or min(a.shape[0], b.shape[1]) < lambda_d.shape[0]:
        raise InputError(
            f"{module}: projections {a.shape}, {b.shape} are smaller than {lambda_b.shape}, {lambda_d.shape}"
        )
    return Vera(module, a, b, lambda_b, lambda_d)


def _ia3(module: str, found: Parts) -> Fold:
    (scale,) = _need(module, found, "ia3_l")
    if len(scale.shape) != 2 or 1 not in scale.shape:
        raise InputError(f"{module}: ia3_l has shape {scale.shape}, expected (1, in) or (out, 1)")
    return Ia3(module, scale, inputs=scale.shape[0] == 1)


def _oft(config: Mapping[str, Any], module: str, found: Parts) -> Fold:
    (vectors,) = _need(module, found, "oft_R")
    if config.get("coft"):
        raise InputError("coft is set: PEFT projects the rotations anew in every forward; that is not merged")
    if "use_cayley_neumann" not in config:
        raise InputError("use_cayley_neumann is not recorded: an older PEFT wrote this, whose OFT is another formula")
    count = vectors.shape[-1]
    block = (1 + math.isqrt(1 + 8 * count)) // 2
    if len(vectors.shape) != 2 or block * (block - 1) // 2 != count:
        raise InputError(f"{module}: oft_R has shape {vectors.shape}, not blocks of upper triangles")
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann") else None
    terms = 4 if terms == 3 else terms  # PEFT's third term brings the fourth with it
    return Oft(module, vectors, block, -1 if config.get("block_share") else vectors.shape[0] * block, terms)
