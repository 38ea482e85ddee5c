"""Reads a checkpoint of AutoRound's GPTQ-packed integers back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from requant.checkpoint.reader import Checkpoint
from requant.formats.auto_round import SUFFIXES, keeps_zero_points, shapes, unpack_stream
from requant.formats.bit_stream import BITS, WORD
from requant.formats.stored_reader import StoredReader, have_shapes


class AutoRoundReader(StoredReader):
    """The tensors of an AutoRound checkpoint by the names that they have in a 16-bit checkpoint.

    How many bits a code has follows from the zero points, which are packed along the outputs.
    minus_one: how zero points are stored.
    """

    suffixes, named = SUFFIXES, "AutoRound"
    dtypes: ClassVar = {s: torch.float16 if s == "scales" else torch.int32 for s in SUFFIXES}

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.minus_one = not keeps_zero_points(checkpoint.quantization)

    def stored(self, weight: str) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape of the three tensors; InputError for one that is missing or does not fit."""
        found = self.found(weight, dict.fromkeys(SUFFIXES, 2))
        rows, groups, bits = found["qweight"][1], found["scales"][0], _bits(found["qzeros"], found["scales"])
        if bits not in BITS or not have_shapes(found, shapes, rows, _columns(found["qweight"], bits), bits, groups):
            raise self.not_of_one_weight(weight, found)
        return found

    def stream(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`decode` with the codes as a stream of bits along the inputs: int32 [in*bits/32, out]."""
        bits = _bits(tensors["qzeros"].shape, tensors["scales"].shape)
        return unpack_stream(tensors, bits, minus_one=self.minus_one)

    def bits_and_group_size(self, weight: str) -> tuple[int, int]:
        """Bits and group size of a quantized weight, from headers."""
        found = self.stored(weight)
        bits = _bits(found["qzeros"], found["scales"])
        return bits, _columns(found["qweight"], bits) // found["scales"][0]


def _bits(qzeros: Sequence[int], scales: Sequence[int]) -> int:
    """Bits of a code, from the shapes of zero points [groups, out*bits/32] and scales [groups, out]."""
    return WORD * qzeros[1] // scales[1]


def _columns(qweight: Sequence[int], bits: int) -> int:
    """Inputs of a weight whose codes are `qweight` [in*bits/32, out]."""
    return WORD * qweight[0] // bits
