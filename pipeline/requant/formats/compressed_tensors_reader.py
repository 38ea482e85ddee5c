"""Reads a compressed-tensors checkpoint of packed integers back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from requant.formats.bit_stream import BITS, WORD
from requant.formats.compressed_tensors import SUFFIXES, shapes, unpack_stream
from requant.formats.stored_reader import StoredReader, have_shapes


class CompressedTensorsReader(StoredReader):
    """The tensors of a compressed-tensors checkpoint by the names that they have in a 16-bit checkpoint.

    How many bits a code has follows from the shape that is stored beside the codes.
    """

    suffixes, named = SUFFIXES, "compressed-tensors"
    dtypes: ClassVar = dict(zip(SUFFIXES, (torch.int32, torch.float16, torch.int32, torch.int64), strict=True))

    def stored(self, weight: str) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape of the three or four tensors; InputError for one that is missing or does not fit."""
        zeros = f"{weight.removesuffix('weight')}weight_zero_point"
        dims = {s: 2 for s in SUFFIXES[:-1] if s != "weight_zero_point" or zeros in self.checkpoint}
        found = self.found(weight, {**dims, "weight_shape": 1})
        if found["weight_shape"] != (2,):
            raise self.not_of_one_weight(weight, found)
        rows, columns = self._sizes(weight)
        bits = WORD * found["weight_packed"][1] // columns if columns > 0 else 0
        symmetric, groups = "weight_zero_point" not in found, found["weight_scale"][1]
        if bits not in BITS or not have_shapes(found, shapes, rows, columns, bits, groups, symmetric=symmetric):
            raise self.not_of_one_weight(weight, found | {"weight_shape": (rows, columns)})
        return found

    def stream(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`decode` with the codes as a stream of bits along the inputs: int32 [in*bits/32, out]."""
        return unpack_stream(tensors, WORD * tensors["weight_packed"].shape[1] // int(tensors["weight_shape"][1]))

    def bits_and_group_size(self, weight: str) -> tuple[int, int]:
        """Bits and group size of a quantized weight, from headers and the stored shape."""
        found, columns = self.stored(weight), self._sizes(weight)[1]
        return WORD * found["weight_packed"][1] // columns, columns // found["weight_scale"][1]

    def _sizes(self, weight: str) -> tuple[int, int]:
        """Outputs and inputs of a weight, as stored."""
        rows, columns = self.checkpoint.read(f"{weight.removesuffix('weight')}weight_shape").tolist()
        return int(rows), int(columns)
