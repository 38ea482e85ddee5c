"""Reads an AWQ checkpoint of AutoAWQ's GEMM packing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from requant.formats.awq import BITS, SUFFIXES, shapes, unpack
from requant.formats.bit_stream import pack_rows
from requant.formats.stored_reader import StoredReader, have_shapes


class AwqReader(StoredReader):
    """The tensors of an AWQ checkpoint by the names that they have in a 16-bit checkpoint."""

    suffixes, named = SUFFIXES, "AWQ"
    dtypes: ClassVar = {s: torch.float16 if s == "scales" else torch.int32 for s in SUFFIXES}

    def stored(self, weight: str) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape of the three tensors; InputError for one that is missing or does not fit."""
        found = self.found(weight, dict.fromkeys(SUFFIXES, 2))
        columns, (groups, rows) = found["qweight"][0], found["scales"]
        if not have_shapes(found, shapes, rows, columns, BITS, groups):
            raise self.not_of_one_weight(weight, found)
        return found

    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes, scales, zeros and group indices in the tensors of a quantized weight."""
        return unpack(tensors)

    def stream(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`decode` with the codes as a stream of bits along the inputs: int32 [in*bits/32, out]."""
        codes, scale, zero, group = unpack(tensors)
        return pack_rows(codes.T, BITS), scale, zero, group

    def bits_and_group_size(self, weight: str) -> tuple[int, int]:
        """Bits and group size of a quantized weight, from headers."""
        found = self.stored(weight)
        return BITS, found["qweight"][0] // found["scales"][0]
