"""Page-locked host memory that is used again for copies from a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**29  # bytes; torch keeps page-locked memory until the process ends, also what was outgrown


class Staging:
    """Memory for one tensor at a time, page-locked where there is a GPU.

    Memory of its own for each costs its pages twice: when they are filled, and when they are given back, 8 ms for 117 MB in
    which no other thread has the interpreter, and a GPU runs out of work.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def room(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], the same memory each time: what was there before is lost. Beyond LARGEST it is fresh."""
        if nbytes > LARGEST:
            return fresh(nbytes)
        if nbytes > len(self._memory):
            self._memory = locked(nbytes)
        return self._memory[:nbytes]

    def fetched(self, tensor: Tensor) -> Tensor:
        """A tensor on the host: one of the CPU itself, a GPU's in this memory, once its stream has come there."""
        if not tensor.is_cuda:
            return tensor
        return self.room(tensor.nbytes).view(tensor.dtype).reshape(tensor.shape).copy_(tensor)


@contextmanager
def on(stream: Any) -> Iterator[None]:
    """Work on a GPU's stream, whichever GPU is this thread's own. Leaving `torch.cuda.stream` alone begins that other one: a
    third of a second in which nothing of this process gets to any GPU, and half a gigabyte there.
    """
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


def sent(tensor: Tensor) -> Callable[[], Tensor]:
    """A small tensor on its way to the host, in its stream's turn: what waits until it is there, and for nothing after it."""
    if not tensor.is_cuda:
        return lambda: tensor
    place = locked(tensor.nbytes).view(tensor.dtype).reshape(tensor.shape)
    place.copy_(tensor, non_blocking=True)
    leaving = torch.cuda.current_stream(tensor.device).record_event()

    def there() -> Tensor:
        leaving.synchronize()
        return place

    return there


def fresh(nbytes: int) -> Tensor:
    """uint8 [nbytes] that nobody else has."""
    return torch.empty(nbytes, dtype=torch.uint8)


def locked(nbytes: int) -> Tensor:
    """uint8 [nbytes], page-locked where that can be had; copies from and to other memory are only slower."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    except RuntimeError:
        return fresh(nbytes)
