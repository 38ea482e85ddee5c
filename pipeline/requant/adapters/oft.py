"""OFT: W @ R', R block-diagonal and near orthogonal (arXiv:2306.07280)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from requant.adapters.fold import Fold, Parts, _need, read
from requant.checkpoint.reader import TensorInfo
from requant.errors import InputError


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
