"""What quantize, heal and suggest need to know of a quantized layout on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from requant.checkpoint.reader import Checkpoint


class PackError(ValueError):
    """The tensors do not follow the format.

    The message says what was found and what was expected.
    """


class Reader(Protocol):
    """A written checkpoint by the names of a 16-bit one; created with its directory.

    checkpoint: the tensors as they are stored. quantized: names of the `.weight`s that are stored quantized.
    """

    path: Path
    checkpoint: Checkpoint
    quantized: frozenset[str]

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def unpack(self, weight: str, device: torch.device = ...) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes uint8 [out, in], scale and zero fp32 [out, groups], group of each input int64 [in]."""
        ...

    def read(self, name: str, device: torch.device = ...) -> Tensor:
        """A tensor; a quantized weight is dequantized to fp32 [out, in]."""
        ...

    def bits_and_group_size(self, weight: str) -> tuple[int, int]:
        """Bits and group size of a quantized weight, from headers."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizedFormat:
    """The functions of one layout.

    suffixes: names of the tensors that replace `weight`. shapes: (rows, columns, bits, group_size) -> suffix -> shape and
    dtype; raises PackError. pack: (codes [out, in], scale and zero [out, groups], bits) -> tensors by suffix; raises
    PackError. unpack: (tensors, bits) -> codes, scale, zero, group of each input. dequantize: (tensors, bits) -> fp32
    [out, in]. config: keyword arguments -> `quantization_config`. recognise: whether a `quantization_config` is of this
    layout. reader: reads a written checkpoint, by its directory.
    """

    suffixes: tuple[str, ...]
    shapes: Callable[[int, int, int, int], Mapping[str, tuple[tuple[int, ...], torch.dtype]]]
    pack: Callable[[Tensor, Tensor, Tensor, int], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], int], tuple[Tensor, Tensor, Tensor, Tensor]]
    dequantize: Callable[[Mapping[str, Tensor], int], Tensor]
    config: Callable[..., dict[str, Any]]
    recognise: Callable[[Mapping[str, Any]], bool]
    reader: Callable[[Path], Reader]
