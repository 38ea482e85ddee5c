"""LoRA on stacked experts: W[e] + s * B[e] @ A[e] (PEFT's target_parameters).

A part of the kind LORA that cannot be built from the adapter alone: the file does not name the parameter. Loading keeps
an `ExpertPair`; `expert_layouts` makes folds of it once the base's shapes are known.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from requant.adapters import fp64
from requant.adapters.fold import Fold, product_bound, read, read_rows
from requant.adapters.module_tensors import ModuleTensors
from requant.checkpoint.reader import TensorInfo

Order = Literal["peft", "unsloth"]  # of the experts in lora_B: see `expert_order`
AskedOrder = Literal["auto", "peft", "unsloth"]  # auto: as recorded, or measured


@dataclass(frozen=True, slots=True)
class ExpertPair:
    """lora_A and lora_B of one stacked parameter of `module`.

    Only the base's shapes determine which parameter it is.
    """

    module: str
    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class StackedLora(Fold):
    """LoRA on stacked experts, or on the slice of them that one stored tensor contains.

    a: [experts * r, in], expert after expert. b: [out, r * experts], in PEFT's order the expert changing fastest, in
    unsloth's expert after expert.
    expert: which one; None: all, stacked. transposed: PEFT took the parameter for [experts, in, out].
    first, last: the rows of one expert's matrix, as it is stored, that the tensor contains; last -1: all.
    turns: see `stacked_experts.Part`; (): the rows are stored in the parameter's order.
    """

    a: TensorInfo
    b: TensorInfo
    scaling: float
    experts: int
    transposed: bool
    expert: int | None = None
    first: int = 0
    last: int = -1
    order: Order = "peft"
    turns: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.b.shape[0], self.a.shape[1]
        if self.transposed:
            rows, columns = columns, rows
        rows = rows if self.last < 0 else self.last - self.first
        rows = 2 * rows // len(self.turns) if self.turns else rows
        return (rows, columns) if self.expert is not None else (self.experts, rows, columns)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return (self.a, self.b)

    def factors(self, expert: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """(left [rows, r], right [r, columns]) of one expert as it is stored; `b` is `read_b()`."""
        rank = self.a.shape[0] // self.experts
        expert_b, expert_a = b[:, self.columns(expert)], read_rows(self.a, expert * rank, (expert + 1) * rank)
        if not self.transposed:
            return self._in_turns(expert_b), expert_a
        return self._in_turns((expert_a if self.last < 0 else expert_a[:, self.first : self.last]).T), expert_b.T

    def _in_turns(self, left: Tensor) -> Tensor:
        """Rows of a parameter where the file has them; zeros in those of another."""
        if not self.turns:
            return left
        parts = left.chunk(len(self.turns))
        stored = left.new_zeros(2 * len(parts[0]), left.shape[1])
        for place, part in zip(self.turns, parts, strict=True):
            stored[place::2] = part
        return stored

    def columns(self, expert: int) -> slice:
        """Which columns of lora_B are the expert's."""
        if self.order == "peft":
            return slice(expert, None, self.experts)
        rank = self.a.shape[0] // self.experts
        return slice(expert * rank, (expert + 1) * rank)

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

    def exact_rows(self, rows: Tensor, index: list[int]) -> fp64.Exact:
        a, b = fp64.read64(self.a), fp64.read64(self.b)
        rank = a.shape[0] // self.experts
        pairs = []
        for expert in index if self.expert is None else [self.expert]:
            peft, unsloth = ([r * self.experts + expert for r in range(rank)], [expert * rank + r for r in range(rank)])
            left = b[:, peft if self.order == "peft" else unsloth]
            right = a[[expert * rank + r for r in range(rank)]]
            left, right = (right.T, left.T) if self.transposed else (left, right)
            pairs.append((fp64.rows_in_turns(left, self.turns), right))
        if self.expert is not None:
            (left, right), chosen = pairs[0], [self.first + i for i in index]
            return fp64.add_product(rows, left[chosen], right, self.scaling)
        every = [fp64.add_product(row, *pair, self.scaling) for row, pair in zip(rows, pairs, strict=True)]
        return fp64.Exact(torch.stack([e.values for e in every]), torch.stack([e.bound for e in every]))


def in_unsloths_order(folds: Iterable[Fold]) -> dict[TensorInfo, int]:
    """lora_B that is in unsloth's order -> its number of experts, of some folds."""
    return {f.b: f.experts for f in folds if isinstance(f, StackedLora) and f.order == "unsloth"}


def in_pefts_order(b: Tensor, experts: int) -> Tensor:
    """lora_B [out, experts * r] in unsloth's order with its columns in PEFT's."""
    return b.view(len(b), experts, -1).transpose(1, 2).reshape(b.shape)


def is_stacked(tensors: ModuleTensors) -> bool:
    """Whether a module's LoRA is on a stacked parameter.

    It is if `target_parameters` names it, or if its tensors contain several ranks.
    """
    module, a = tensors.module, tensors.found.get("lora_A")
    names = [str(p).rpartition(".") for p in tensors.config["target_parameters"]]
    if any(module == owner or module.endswith("." + owner) for owner, _, leaf in names if leaf != "weight"):
        return True
    return a is not None and len(a.shape) == 2 and a.shape[0] > tensors.config.rank(module)


def pair(tensors: ModuleTensors) -> ExpertPair:
    """The pair lora_A, lora_B of one stacked parameter.

    Raises InputError when there are other tensors or the two do not multiply.
    """
    module, found = tensors.module, tensors.found
    a, b = found.get("lora_A"), found.get("lora_B")
    if a is None or b is None or len(found) > 2:
        raise tensors.error(f"{module} has {', '.join(sorted(found))}; expected lora_A and lora_B alone")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise tensors.error(f"{module}: lora_A {a.shape} and lora_B {b.shape} do not multiply")
    return ExpertPair(module, a, b)
