"""A tensor of the base that is stored in few bits, and how it and its scales are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from requant.checkpoint.reader import Checkpoint, TensorInfo, read_tensor
from requant.errors import InputError
from requant.numerics.finite import count_not_finite


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedWeight:
    """One tensor as a 16-bit checkpoint would hold it.

    name, shape, dtype: of what `read` returns. parts: names of the stored tensors that it is decoded from.
    scales: that one of them which holds the scales. read: can be pickled, for the other processes of a run.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[str, ...]
    scales: TensorInfo
    read: Callable[[], Tensor]


def read_scales(info: TensorInfo) -> Tensor:
    """The scales of an encoded weight as stored: floats, or exponents in uint8.

    Raises InputError, with file, tensor and count, where some are NaN or infinity.
    """
    scales = read_tensor(info)
    values = (scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales).float()
    if bad := count_not_finite(values):
        raise InputError(
            f"{info.file}: {info.name}: {bad} of {scales.numel()} scales are NaN or infinity: download the file again"
        )
    return scales


class BaseFormat(Protocol):
    """A format in which bases are stored; one file each."""

    NAME: str

    def encoded(self, checkpoint: Checkpoint) -> tuple[list[EncodedWeight], frozenset[str]]:
        """(the encoded weights, further stored tensors that only describe them or activations).

        Raises InputError for tensors that do not belong together or are of another format.
        """
