"""A checkpoint whose stacked tensors are read in pieces, each under a name of its own.

Experts of a layer are stored in one tensor [experts, ...]; solver and servers want the matrices of each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from requant.checkpoint.reader import Checkpoint, TensorInfo, read_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One entry of a stacked tensor's first dimension, or a part of it.

    stacked: name of the tensor. index: of the entry. shape: of the piece. first: of the entry's rows, where the piece
    is a run of them. select: makes the piece of the entry where it is no run of rows.
    """

    stacked: str
    index: int
    shape: tuple[int, ...]
    first: int = 0
    select: Callable[[Tensor], Tensor] | None = None

    def of(self, stacked: Tensor) -> Tensor:
        """The piece of the stacked tensor's values."""
        entry = stacked[self.index]
        return self.select(entry) if self.select else entry[self.first : self.first + self.shape[0]]


class PiecewiseCheckpoint(Checkpoint):
    """A checkpoint that holds pieces of some tensors too, each read and sized by a name of its own."""

    def __init__(self, whole: Checkpoint, pieces: Mapping[str, Piece]) -> None:
        self.path, self.pieces = whole.path, pieces
        self._infos = dict(whole) | {name: _info(name, whole[piece.stacked], piece) for name, piece in pieces.items()}
        self._entries = {
            name: whole[piece.stacked].entry(piece.index) for name, piece in pieces.items() if piece.select
        }

    def contiguous(self, name: str) -> bool:
        return name in self._infos and name not in self._entries

    def read(self, name: str) -> Tensor:
        """The tensor or piece `name` on the CPU, in the dtype of the file."""
        if name not in self._entries:
            return read_tensor(self[name])
        select = self.pieces[name].select
        assert select is not None
        return select(read_tensor(self._entries[name])).contiguous()


def _info(name: str, stacked: TensorInfo, piece: Piece) -> TensorInfo:
    """Header of a piece; of one that is no run of rows the size, but not the place, is its own."""
    entry = stacked.entry(piece.index)
    first = entry.rows(piece.first, piece.first + 1)
    return replace(first, name=name, shape=piece.shape, nbytes=prod(piece.shape) * stacked.dtype.itemsize)
