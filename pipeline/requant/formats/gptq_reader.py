"""Reads a GPTQ checkpoint back: the one reader that healing, evaluation and tests share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from requant.checkpoint.reader import Checkpoint
from requant.formats.bit_stream import BITS
from requant.formats.gptq import SUFFIXES, bits_of, is_v2, shapes, unpack_stream
from requant.formats.stored_reader import StoredReader, have_shapes


class GptqReader(StoredReader):
    """The tensors of a GPTQ checkpoint by the names that they have in a 16-bit checkpoint.

    v2: zero points are stored as they are, not minus one.
    """

    suffixes, named = SUFFIXES, "GPTQ"
    dtypes: ClassVar = {s: torch.float16 if s == "scales" else torch.int32 for s in SUFFIXES}

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.v2 = is_v2(checkpoint.quantization)

    def stored(self, weight: str) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape of the four tensors; InputError for one that is missing or does not fit."""
        found = self.found(weight, {suffix: 1 if suffix == "g_idx" else 2 for suffix in SUFFIXES})
        columns, rows, groups = found["g_idx"][0], found["qweight"][1], found["scales"][0]
        bits = bits_of(found["qweight"], columns)
        if bits not in BITS or not have_shapes(found, shapes, rows, columns, bits, groups):
            raise self.not_of_one_weight(weight, found)
        return found

    def stream(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`decode` with the codes as a stream of bits along the inputs: int32 [in*bits/32, out]."""
        return unpack_stream(tensors, bits_of(tensors["qweight"].shape, tensors["g_idx"].shape[0]), v2=self.v2)

    def bits_and_group_size(self, weight: str) -> tuple[int, int]:
        """Bits and group size of a quantized weight, from headers."""
        found = self.stored(weight)
        columns, groups = found["g_idx"][0], found["scales"][0]
        return bits_of(found["qweight"], columns), columns // groups
