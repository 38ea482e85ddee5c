"""Reads a checkpoint of MLX's affine quantization back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from requant.checkpoint.reader import Checkpoint
from requant.formats.bit_stream import WORD
from requant.formats.mlx import SUFFIXES, settings_of, shapes, unpack_stream
from requant.formats.stored_reader import CPU, StoredReader, have_shapes

BITS = "bits"  # what the shapes of a linear's tensors do not say, beside them


class MlxReader(StoredReader):
    """The tensors of an MLX checkpoint by the names that they have in a 16-bit checkpoint.

    A weight with scales beside it is quantized. 4 bits in groups of 32 have the shapes of 2 bits in groups of 64: which
    it is stands in the config alone.
    """

    suffixes, named = SUFFIXES, "MLX"
    dtypes: ClassVar = dict(zip(SUFFIXES, (torch.uint32, torch.float16, torch.float16), strict=True))

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.quantized = frozenset(n for n in self.quantized if f"{n.removesuffix('weight')}scales" in checkpoint)
        self.declared = checkpoint.quantization

    def stored(self, weight: str) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape of the three tensors; InputError for one that is missing or does not fit."""
        found = self.found(weight, dict.fromkeys(SUFFIXES, 2))
        bits, size = self.bits_and_group_size(weight)
        columns, groups = WORD * found["weight"][1] // bits, found["scales"][1]
        fits = columns == groups * size and have_shapes(found, shapes, found["weight"][0], columns, bits, groups)
        if not fits:
            raise self.not_of_one_weight(weight, found)
        return found

    def tensors(self, weight: str, device: torch.device = CPU) -> dict[str, Tensor]:
        """The tensors of a quantized weight by their suffixes, and its bits, int64 [], as BITS."""
        return {**super().tensors(weight, device), BITS: torch.tensor(self.bits_and_group_size(weight)[0])}

    def stream(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`decode` with the codes as a stream of bits along the inputs: int32 [in*bits/32, out]."""
        return unpack_stream(tensors, int(tensors[BITS]))

    def is_symmetric(self, weight: str, *, declared: bool) -> bool:
        """Whether every bias is minus the middle code times its scale, which no config of MLX says."""
        found, stem = self.stored(weight), weight.removesuffix("weight")
        middle = 2 ** (self.bits_and_group_size(weight)[0] - 1)
        scales, biases = (self.checkpoint.read(f"{stem}{suffix}").float() for suffix in found if suffix != "weight")
        return torch.equal(biases, -middle * scales)

    def bits_and_group_size(self, weight: str) -> tuple[int, int]:
        """Bits and group size of a quantized weight, as the config says."""
        own = settings_of(self.declared, weight.removesuffix(".weight")) or self.declared
        return own["bits"], own["group_size"]
