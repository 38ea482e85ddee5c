"""Reads a quantized checkpoint back: what the readers of all layouts share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from requant.checkpoint.device_loader import load_onto
from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError
from requant.formats.bit_stream import WORD, unpack_rows
from requant.formats.quantized_format import PackError, Shapes, weights

CPU = torch.device("cpu")


class StoredReader(ABC):
    """The tensors of a quantized checkpoint by the names that they have in a 16-bit one.

    quantized: names of the `.weight`s that are stored as tensors of the layout. A layout's reader says what its tensors
    are called (the one with the codes first), what it is called itself, which of them belong to a weight, and decodes.
    dtypes: of its tensors, of scales any of floating point.
    """

    suffixes: ClassVar[tuple[str, ...]]
    dtypes: ClassVar[Mapping[str, torch.dtype]]
    named: ClassVar[str]

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        codes = self.suffixes[0]
        self.quantized = frozenset(n.removesuffix(codes) + "weight" for n in checkpoint if n.endswith(f".{codes}"))

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the checkpoint, a quantized weight at the place of its codes."""
        for name in self.checkpoint:
            stem, _, suffix = name.rpartition(".")
            if suffix == self.suffixes[0]:
                yield f"{stem}.weight"
            elif suffix not in self.suffixes or f"{stem}.weight" not in self.quantized:
                yield name

    def __contains__(self, name: object) -> bool:
        return name in self.quantized or name in self.checkpoint

    @abstractmethod
    def stored(self, weight: str) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape of a quantized weight's tensors; InputError for one that is missing or does not fit."""

    @abstractmethod
    def stream(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`decode` with the codes as a stream of bits along the inputs: int32 [in*bits/32, out]."""

    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes, scales, zeros and group indices in the tensors of a quantized weight.

        uint8 [out, in], fp32 [out, groups], fp32 [out, groups], int64 [in].
        """
        stream, scale, zero, group = self.stream(tensors)
        bits = WORD * stream.shape[0] // len(group)
        return unpack_rows(stream.contiguous(), bits).T.contiguous(), scale, zero, group

    @abstractmethod
    def bits_and_group_size(self, weight: str) -> tuple[int, int]:
        """Bits and group size of a quantized weight, without its codes."""

    def is_symmetric(self, weight: str, *, declared: bool) -> bool:
        """Whether all zero points of a quantized weight are the middle one. declared: what the config says."""
        return declared

    def tensors(self, weight: str, device: torch.device = CPU) -> dict[str, Tensor]:
        """The tensors of a quantized weight by their suffixes.

        Raises InputError when one is missing.
        """
        stem = weight.removesuffix("weight")
        return {s: load_onto(self.checkpoint, f"{stem}{s}", device) for s in self.stored(weight)}

    def unpack(self, weight: str, device: torch.device = CPU) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`decode` of a quantized weight."""
        return self.decode(self.tensors(weight, device))

    def read(self, name: str, device: torch.device = CPU) -> Tensor:
        """A tensor.

        A quantized weight is dequantized on `device` to fp32 [out, in], others are read as stored.
        """
        if name not in self.quantized:
            return self.checkpoint.read(name)
        return weights(*self.unpack(name, device))

    def found(self, weight: str, dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape of the tensors in `dims`, which says how many sizes each has.

        Raises InputError unless each is there, of its dtype, with so many sizes and none of them zero.
        """
        stem, found = weight.removesuffix("weight"), dict[str, tuple[int, ...]]()
        for suffix, expected in dims.items():
            name = f"{stem}{suffix}"
            if name not in self.checkpoint:
                raise InputError(f"{self.checkpoint.path}: {name} is missing: the {self.named} checkpoint is damaged")
            found[suffix], dtype, own = self.checkpoint[name].shape, self.checkpoint[name].dtype, self.dtypes[suffix]
            if dtype != own and not (dtype.is_floating_point and own.is_floating_point):
                raise InputError(
                    f"{self.checkpoint.path}: {name} is {dtype}, expected {own}: the {self.named} checkpoint is damaged"
                )
            if len(found[suffix]) != expected or not all(found[suffix]):
                raise InputError(
                    f"{self.checkpoint.path}: {name} has shape {list(found[suffix])}, expected {expected} sizes"
                )
        return found

    def not_of_one_weight(self, weight: str, found: Mapping[str, tuple[int, ...]]) -> InputError:
        """The error of tensors that do not belong together."""
        told = ", ".join(f"{suffix} {list(shape)}" for suffix, shape in found.items())
        return InputError(
            f"{self.checkpoint.path}: the tensors of {weight.removesuffix('.weight')} are not of one weight: {told}: "
            f"the {self.named} checkpoint is damaged"
        )


def have_shapes(
    found: Mapping[str, tuple[int, ...]], shapes: Shapes, rows: int, columns: int, bits: int, groups: int, *,
    symmetric: bool = True,
) -> bool:  # fmt: skip
    """Whether tensors have the shapes that a layout gives a weight of these sizes."""
    if columns % groups:
        return False
    try:
        expected = shapes(rows, columns, bits, columns // groups, symmetric=symmetric)
    except PackError:
        return False
    return {suffix: shape for suffix, (shape, _) in expected.items()} == dict(found)
