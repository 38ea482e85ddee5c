"""What quantize, heal, evaluate and verify need to know of a quantized layout on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from requant.checkpoint.reader import Checkpoint, TensorInfo


class PackError(ValueError):
    """The tensors do not follow the format.

    The message says what was found and what was expected.
    """


def weights(codes: Tensor, scale: Tensor, zero: Tensor, group: Tensor) -> Tensor:
    """Decoded weights fp32 [out, in].

    codes: [out, in]. scale, zero: [out, groups]. group: of each input [in].
    """
    return (codes.float() - zero[:, group]) * scale[:, group]


def _nothing(config: Mapping[str, Any]) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong with a checkpoint. where: a tensor name, or `file: key`."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How one linear is packed, as the config says. columns, rows: of its weight [out, in]."""

    bits: int
    group_size: int
    symmetric: bool
    desc_act: bool
    rows: int
    columns: int


class Shapes(Protocol):
    """Suffix -> shape and dtype of one linear's tensors; raises PackError when it cannot be packed."""

    def __call__(
        self, rows: int, columns: int, bits: int, group_size: int, *, symmetric: bool = ...
    ) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]: ...


class Pack(Protocol):
    """Codes [out, in], or their stream, scale and zero [out, groups] -> one linear's tensors; raises PackError."""

    def __call__(
        self, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, /, *, symmetric: bool = ...
    ) -> dict[str, Tensor]: ...


class Rules(Protocol):
    """Which linears a quantization config declares as quantized, and how."""

    def of(self, module: str, inner: str, linear: nn.Linear) -> Packing | None:
        """Packing of one linear by its full name and its name inside the block; None: left in 16 bit."""
        ...

    def end(self, module: str, layer: nn.Module, *, stored: bool) -> Packing | None:
        """Packing of the token embeddings or the head; None: in 16 bit. stored: whether packed tensors are there."""
        ...


class SixteenBitEnds:
    """The part of the rules of a layout that holds no quantized embeddings and no quantized head."""

    def end(self, module: str, layer: nn.Module, *, stored: bool) -> Packing | None:
        """None: in 16 bit."""
        return None


class Reader(Protocol):
    """A written checkpoint by the names of a 16-bit one; created with its `Checkpoint`.

    checkpoint: the tensors as they are stored. quantized: names of the `.weight`s that are stored quantized.
    """

    checkpoint: Checkpoint
    quantized: frozenset[str]

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def tensors(self, weight: str, device: torch.device = ...) -> dict[str, Tensor]:
        """The stored tensors of a quantized weight by their suffixes."""
        ...

    def decode(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes uint8 [out, in], scale and zero fp32 [out, groups], group of each input int64 [in]."""
        ...

    def unpack(self, weight: str, device: torch.device = ...) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`decode` of the stored tensors of a quantized weight."""
        ...

    def read(self, name: str, device: torch.device = ...) -> Tensor:
        """A tensor; a quantized weight is dequantized to fp32 [out, in]."""
        ...

    def bits_and_group_size(self, weight: str) -> tuple[int, int]:
        """Bits and group size of a quantized weight, from headers."""
        ...

    def is_symmetric(self, weight: str, *, declared: bool) -> bool:
        """Whether all zero points of a quantized weight are the middle one. declared: what the config says."""
        ...


class Checks(Protocol):
    """What `verify` asks a layout about a written checkpoint; whatever is wrong is a `Finding` or a sentence."""

    def config(self, declared: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
        """Faults of a `quantization_config`, and whether the tensors can be checked in spite of each."""
        ...

    def header(self, suffix: str, info: TensorInfo | None, packing: Packing) -> str | None:
        """What is wrong with the header of one stored tensor; None: nothing. info: None when it is missing."""
        ...

    def values(self, stem: str, tensors: Mapping[str, Tensor], packing: Packing, reader: Reader) -> Iterator[Finding]:
        """What is wrong with the values of one linear's tensors."""
        ...

    def files(self, path: Path, declared: Mapping[str, Any]) -> Iterator[Finding]:
        """What is wrong with other files that repeat the config."""
        ...

    def zero_points(self, declared: Mapping[str, Any]) -> tuple[str, str]:
        """Suffix of the zero points, and what is wrong when they are not stored as the config says."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFormat:
    """What is needed to read one layout.

    name: as commands call it. suffixes: names of the tensors that replace `weight`, some of them only where it is
    asymmetric. codes: the one that holds the codes. recognise: whether a `quantization_config` is of this layout.
    rules: `quantization_config` -> which linears it declares as quantized. reader: reads a written checkpoint.
    checks: what `verify` asks.
    """

    name: str
    suffixes: tuple[str, ...]
    codes: str
    shapes: Shapes
    recognise: Callable[[Mapping[str, Any]], bool]
    rules: Callable[[Mapping[str, Any]], Rules]
    reader: Callable[[Checkpoint], Reader]
    checks: Checks


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedFormat(StoredFormat):
    """The functions of one layout that is written too.

    unpack: (tensors, bits) -> codes, scale, zero, group of each input. dequantize: (tensors, bits) -> fp32 [out, in].
    config: arguments of `gptq.quantization_config` -> `quantization_config`. config_file: where the config is written a
    second time; None: nowhere. pack_stream: `pack` of codes that are a stream of bits along the inputs already, int32
    [in*bits/32, out]; None: this layout holds no such stream. with_zeros: how a checkpoint is written in which a linear
    has zero points; None: alike. config_keys: of config.json, under which the config is written. zero_rounding: the
    largest relative change of a zero point by how it is stored. by_class: engines take every module of the class Linear
    for quantized that no rule names, whatever the file holds. ends: whether it holds token embeddings and head
    quantized. head: whether it holds a quantized head beside embeddings in 16 bit. tied_ends: whether it holds both
    also where they are one matrix. beside: config.json -> what its engine looks for there under names of its own.
    """

    pack: Pack
    unpack: Callable[[Mapping[str, Tensor], int], tuple[Tensor, Tensor, Tensor, Tensor]]
    dequantize: Callable[[Mapping[str, Tensor], int], Tensor]
    config: Callable[..., dict[str, Any]]
    config_file: str | None
    pack_stream: Pack | None = None
    with_zeros: QuantizedFormat | None = None
    config_keys: tuple[str, ...] = ("quantization_config",)
    zero_rounding: float = 0.0
    by_class: bool = False
    ends: bool = False
    head: bool = False
    tied_ends: bool = False
    beside: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing

    def of(self, *, symmetric: bool) -> QuantizedFormat:
        """The layout of a checkpoint whose linears are all symmetric, or not."""
        return self if symmetric else self.with_zeros or self

    def why_no_ends(self, *, tied: bool, embeddings: bool = True) -> str | None:
        """Why it does not hold token embeddings and head quantized, None: it does.

        tied: they are one matrix. embeddings: whether they are to be quantized, and not the head alone.
        """
        if not self.ends and not self.head:
            return "holds embeddings and head in 16 bit alone: compressed-tensors, mlx and gguf have them quantized"
        if not self.ends and (embeddings or tied):
            return (
                "has a quantized head alone, of two matrices: compressed-tensors, mlx, gguf have embeddings quantized"
            )
        if tied and not self.tied_ends:
            return (
                "has quantized embeddings and a quantized head only where they are two matrices, and here they are "
                "one: mlx and gguf have those too"
            )
        return None
