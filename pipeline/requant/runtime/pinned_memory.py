"""Page-locked host memory for copies from a GPU, and work on a CUDA stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**29  # bytes; torch keeps page-locked memory until the process ends, also replaced buffers


class PinnedBuffer:
    """A reusable host buffer for one tensor at a time, page-locked where there is a GPU.

    New memory for each tensor costs time twice: when its pages are filled and when they are freed. Freeing 117 MB takes
    8 ms in which no other thread has the interpreter, so the GPU runs out of work.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def of_size(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], the same memory each time; beyond LARGEST new memory.

        What the buffer contained before is overwritten by the caller.
        """
        if nbytes > LARGEST:
            return allocate(nbytes)
        if nbytes > len(self._memory):
            self._memory = allocate_pinned(nbytes)
        return self._memory[:nbytes]

    def to_host(self, tensor: Tensor) -> Tensor:
        """The tensor on the host: a CPU tensor as it is, a GPU tensor copied into the buffer."""
        if not tensor.is_cuda:
            return tensor
        return self.of_size(tensor.nbytes).view(tensor.dtype).reshape(tensor.shape).copy_(tensor)


@contextmanager
def use_stream(stream: Any) -> Iterator[None]:
    """Run the block on a stream, with the stream's GPU as the current device.

    `torch.cuda.stream` alone restores the previous GPU on exit and so initialises it: 0.3 s in which this process
    reaches no GPU, and half a gigabyte of that GPU's memory.
    """
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


def copy_to_host_async(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a small tensor to the host.

    The result waits for this copy alone and returns it.
    """
    if not tensor.is_cuda:
        return lambda: tensor
    copy = allocate_pinned(tensor.nbytes).view(tensor.dtype).reshape(tensor.shape)
    copy.copy_(tensor, non_blocking=True)
    copied = torch.cuda.current_stream(tensor.device).record_event()

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait


def allocate(nbytes: int) -> Tensor:
    """New uninitialised host memory, uint8 [nbytes]."""
    return torch.empty(nbytes, dtype=torch.uint8)


def allocate_pinned(nbytes: int) -> Tensor:
    """New host memory, uint8 [nbytes], page-locked where possible.

    Copies to and from memory that is not page-locked are only slower.
    """
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    except RuntimeError:
        return allocate(nbytes)
