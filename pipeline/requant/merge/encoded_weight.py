"""`EncodedWeight`: a tensor of the base that is stored in few bits, and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from requant.checkpoint.reader import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedWeight:
    """One tensor as a 16-bit checkpoint would hold it.

    name, shape, dtype: of what `read` returns. parts: names of the stored tensors that it is decoded from.
    read: can be pickled, for the other processes of a run.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[str, ...]
    read: Callable[[], Tensor]


class BaseFormat(Protocol):
    """A format in which bases are stored; one file each."""

    NAME: str

    def encoded(self, checkpoint: Checkpoint) -> tuple[list[EncodedWeight], frozenset[str]]:
        """(the encoded weights, further stored tensors that only describe them or activations).

        Raises InputError for tensors that do not belong together or are of another format.
        """
