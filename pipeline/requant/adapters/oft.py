"""OFT: W @ R', R block-diagonal and near orthogonal (arXiv:2306.07280)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from requant.adapters import fp64
from requant.adapters.fold import Fold, read
from requant.adapters.module_tensors import ModuleTensors, TensorKey
from requant.checkpoint.reader import TensorInfo

TENSORS = {"oft_R": TensorKey(has_weight=True)}
SETTINGS = frozenset({
    "r", "oft_block_size", "module_dropout", "init_weights", "coft", "eps", "block_share", "use_cayley_neumann",
    "num_cayley_neumann_terms",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Oft(Fold):
    """A rotation of the inputs in blocks of b.

    vectors: [blocks or 1, b (b - 1) / 2], the upper halves of skew-symmetric matrices.
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

    def why_it_does_not_fit(self, shape: tuple[int, ...]) -> str | None:
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
            cayley: Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
            return cayley
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

    def exact_rows(self, rows: Tensor, index: list[int]) -> fp64.Exact:
        vectors, block = fp64.read64(self.vectors), self.block
        out, size = torch.empty_like(rows), torch.empty_like(rows)
        upper = torch.triu_indices(block, block, 1).tolist()
        for start in range(0, rows.shape[1], block):
            skew = torch.zeros(block, block, dtype=torch.float64)
            skew[upper[0], upper[1]] = vectors[start // block % len(vectors)]
            skew = skew - skew.T
            rotation = torch.linalg.inv(torch.eye(block).double() + skew) @ (torch.eye(block).double() - skew)
            if self.terms is not None:
                powers = [torch.linalg.matrix_power(skew, k) for k in range(self.terms)]
                ends = (0, self.terms - 1) if self.terms > 2 else (0,)
                rotation = torch.stack([p * (1 if k in ends else 2) for k, p in enumerate(powers)]).sum(dim=0)
            out[:, start : start + block] = rows[:, start : start + block] @ rotation.T
            size[:, start : start + block] = rows[:, start : start + block].abs() @ rotation.abs().T
        return fp64.Exact(out, size * (block + 16) * (self.terms or block) * fp64.EPS)


def why_not_merged(config: Mapping[str, Any]) -> str | None:
    """The setting without an exact merge, and its reason; None: there is no such setting."""
    if config.get("coft"):
        return "coft is set: PEFT projects the rotations anew in every forward; that is not merged"
    if "use_cayley_neumann" not in config:
        return "use_cayley_neumann is not recorded: an older PEFT wrote this, whose OFT is another formula"
    return None


def build(tensors: ModuleTensors) -> Fold:
    """The OFT rotation of one module's inputs.

    Raises InputError when its vectors are not upper triangles.
    """
    config = tensors.config
    (vectors,) = tensors.exactly("oft_R")
    count = vectors.shape[-1]
    block = (1 + math.isqrt(1 + 8 * count)) // 2
    if len(vectors.shape) != 2 or block * (block - 1) // 2 != count:
        raise tensors.error(f"{tensors.module}: oft_R has shape {vectors.shape}, not blocks of upper triangles")
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann") else None
    terms = 4 if terms == 3 else terms  # PEFT's third term brings the fourth with it
    columns = -1 if config.get("block_share") else vectors.shape[0] * block
    return Oft(module=tensors.module, vectors=vectors, block=block, columns=columns, terms=terms)
