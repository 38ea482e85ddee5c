"""Page-locked host memory for copies from a GPU, and work on a CUDA stream."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PART = 2**25  # bytes of a part
_THREADS = threading.local()  # buffers of each thread
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


def parts_on_host(tensor: Tensor, nbytes: int = PART) -> Iterator[Tensor]:
    """The bytes of a tensor, row-major, as successive uint8 parts on the host.

    Of a GPU tensor a part is copied while the one before is used; it is valid until the next is asked for. A CPU
    tensor is one part, its own memory.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if not flat.is_cuda:
        yield flat
        return
    coming: list[tuple[Tensor, Any]] = []
    for number, part in enumerate(torch.split(flat, nbytes)):
        coming.append((_copied(part, number % 2, nbytes), torch.cuda.current_stream(flat.device).record_event()))
        if len(coming) > 1:
            yield _arrived(*coming.pop(0))
    for one in coming:
        yield _arrived(*one)


def _copied(part: Tensor, number: int, nbytes: int) -> Tensor:
    """A part in one of this thread's two page-locked buffers; the copy is under way."""
    buffers: dict[tuple[int, int], Tensor] = _THREADS.__dict__.setdefault("buffers", {})
    if (number, nbytes) not in buffers:
        buffers[number, nbytes] = allocate_pinned(nbytes)
    return buffers[number, nbytes][: len(part)].copy_(part, non_blocking=True)


def _arrived(copy: Tensor, event: Any) -> Tensor:
    event.synchronize()
    return copy


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
