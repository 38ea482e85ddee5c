"""Reads a GPTQ checkpoint back: the one reader that healing, evaluation and tests share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.formats.gptq import BITS, SUFFIXES, bits_of, dequantize, is_v2, shapes, unpack
from requant.formats.quantized_format import PackError

CPU = torch.device("cpu")


class GptqReader:
    """The tensors of a GPTQ checkpoint by the names that they have in a 16-bit checkpoint.

    quantized: names of the `.weight`s that are stored as four GPTQ tensors.
    v2: zero points are stored as they are, not minus one.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.v2 = is_v2(checkpoint.config.get("quantization_config") or {})
        self.quantized = frozenset(
            n.removesuffix("qweight") + "weight" for n in self.checkpoint if n.endswith(".qweight")
        )

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the checkpoint, a quantized weight at the place of its `qweight`."""
        for name in self.checkpoint:
            stem, _, suffix = name.rpartition(".")
            if suffix == "qweight":
                yield f"{stem}.weight"
            elif suffix not in SUFFIXES or f"{stem}.weight" not in self.quantized:
                yield name

    def __contains__(self, name: object) -> bool:
        return name in self.quantized or name in self.checkpoint

    def tensors(self, weight: str, device: torch.device = CPU) -> dict[str, Tensor]:
        """The four tensors of a quantized weight by their suffixes.

        Raises InputError when one is missing.
        """
        stem = weight.removesuffix("weight")
        return {s: self.checkpoint.read(f"{stem}{s}").to(device) for s in self._shapes(weight)}

    def _shapes(self, weight: str) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape of the four tensors; InputError for one that is missing or does not fit."""
        stem, found = weight.removesuffix("weight"), dict[str, tuple[int, ...]]()
        for suffix in SUFFIXES:
            name, dims = f"{stem}{suffix}", 1 if suffix == "g_idx" else 2
            if name not in self.checkpoint:
                raise InputError(f"{self.checkpoint.path}: {name} is missing: the GPTQ checkpoint is damaged")
            found[suffix] = self.checkpoint[name].shape
            if len(found[suffix]) != dims or not all(found[suffix]):
                raise InputError(
                    f"{self.checkpoint.path}: {name} has shape {list(found[suffix])}, expected {dims} sizes"
                )
        if not _belong_together(found):
            told = ", ".join(f"{suffix} {list(shape)}" for suffix, shape in found.items())
            raise InputError(
                f"{self.checkpoint.path}: the tensors of {stem.removesuffix('.')} are not of one weight: {told}: the "
                "GPTQ checkpoint is damaged"
            )
        return found

    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes, scales, zeros and group indices in the four tensors of a quantized weight.

        uint8 [out, in], fp32 [out, groups], fp32 [out, groups], int64 [in].
        """
        return unpack(tensors, bits_of(tensors["qweight"].shape, tensors["g_idx"].shape[0]), v2=self.v2)

    def unpack(self, weight: str, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`decode` of a quantized weight."""
        return self.decode(self.tensors(weight, device))

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """A tensor.

        A quantized weight is dequantized on `device` to fp32 [out, in], others are read as stored.
        """
        if name not in self.quantized:
            return self.checkpoint.read(name)
        tensors = self.tensors(name, device)
        return dequantize(tensors, bits_of(tensors["qweight"].shape, tensors["g_idx"].shape[0]), v2=self.v2)

    def bits_and_group_size(self, weight: str) -> tuple[int, int]:
        """Bits and group size of a quantized weight, from headers."""
        found = self._shapes(weight)
        columns, groups = found["g_idx"][0], found["scales"][0]
        return bits_of(found["qweight"], columns), columns // groups


def _belong_together(found: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the shapes of four tensors are those of one weight."""
    columns, rows, groups = found["g_idx"][0], found["qweight"][1], found["scales"][0]
    bits = bits_of(found["qweight"], columns)
    if bits not in BITS or columns % groups:
        return False
    try:
        return all(
            found[suffix] == shape for suffix, (shape, _) in shapes(rows, columns, bits, columns // groups).items()
        )
    except PackError:
        return False
