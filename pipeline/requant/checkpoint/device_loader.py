"""Loads a checkpoint's tensors to a device in parts: reads and copies overlap.

`load_onto` is how all stages read a tensor onto a device. A copy from memory that is not page-locked, as `read` gives
it, takes ten times as long.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from requant.checkpoint.reader import Checkpoint, TensorInfo, Weights, cut, opened, read_part, read_tensor
from requant.runtime.pinned_memory import allocate_pinned

# Bytes of a part, a multiple of every item size.
# Many small parts would take the interpreter from the thread that launches kernels.
BUFFER_BYTES = 2**25
BUFFERS = 4


def load_onto(weights: Weights, name: str, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of `weights` on a device, in `dtype` or its own; raises as its `read`."""
    if device.type == "cuda" and isinstance(weights, Checkpoint) and weights.contiguous(name):
        return load_tensor(weights[name], device, dtype)
    return weights.read(name).to(device, dtype)


def load_tensor(info: TensorInfo, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of a file on a device, in `dtype` or its own; raises StageError as `read_tensor`."""
    if device.type != "cuda":
        return read_tensor(info).to(device, dtype)
    index = torch.cuda.current_device() if device.index is None else device.index
    return _loader_of(torch.device("cuda", index)).load(info, dtype or info.dtype)


@cache
def _loader_of(device: torch.device) -> DeviceLoader:
    """The loader of a GPU, whose buffers last as long as the process."""
    return DeviceLoader(device)


class DeviceLoader:
    """Loads tensors from their files to a device through a few reusable page-locked buffers.

    Several threads may load at once. A tensor is never whole on the host: its pages would cost time twice, when they
    are filled and when they are freed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.readers = ThreadPoolExecutor(BUFFERS)
        self.buffers: SimpleQueue[Tensor | None] = SimpleQueue()
        for _ in range(BUFFERS):
            self.buffers.put(None)  # allocated when it is needed

    def load(self, info: TensorInfo, dtype: torch.dtype) -> Tensor:
        """A tensor on the device in the shape of its file, for the current stream.

        Raises StageError when the file has changed or cannot be read.
        """
        whole = torch.empty(info.shape, dtype=dtype, device=self.device)
        transfer = _Transfer(self.buffers, whole.view(-1), info.dtype)
        with opened(info) as file:
            try:
                for part in cut(info.nbytes, BUFFER_BYTES):
                    buffer = transfer.free_buffer()
                    piece = buffer[: part.stop - part.start]
                    transfer.reading.append((self.readers.submit(read_part, file, info, part, piece), part, buffer))
                while transfer.reading:
                    transfer.send()
            finally:
                transfer.clear()
        return whole


class _Transfer:
    """The transfer of one tensor: parts that are being read, and parts in flight to `whole`."""

    def __init__(self, buffers: SimpleQueue[Tensor | None], whole: Tensor, stored: torch.dtype) -> None:
        self.buffers, self.whole, self.stored = buffers, whole, stored
        self.reading: deque[tuple[Future[None], slice, Tensor]] = deque()
        self.in_flight: deque[tuple[Any, Tensor]] = deque()

    def free_buffer(self) -> Tensor:
        """A free buffer.

        A transfer that has buffers frees its own before it waits for those of others.
        """
        while True:
            try:
                buffer = self.buffers.get(block=not self.reading and not self.in_flight)
            except Empty:
                self.send() if self.reading else self.arrive()
                continue
            try:
                return allocate_pinned(BUFFER_BYTES) if buffer is None else buffer
            except BaseException:
                self.buffers.put(None)
                raise

    def send(self) -> None:
        """Wait until the first part is read and begin to copy it.

        The part before it frees its buffer.
        """
        reading, part, buffer = self.reading[0]
        reading.result()
        numbers = buffer[: part.stop - part.start].view(self.stored)
        first = part.start // self.stored.itemsize
        if self.stored != self.whole.dtype:
            numbers = numbers.to(self.whole.device, non_blocking=True)  # the device converts, not the host
        self.whole[first : first + len(numbers)].copy_(numbers, non_blocking=True)
        self.reading.popleft()
        arriving = torch.cuda.current_stream(self.whole.device).record_event() if self.whole.is_cuda else None
        self.in_flight.append((arriving, buffer))
        if len(self.in_flight) > 1:
            self.arrive()

    def arrive(self) -> None:
        """Wait until the oldest part in flight has arrived and free its buffer."""
        arrived, buffer = self.in_flight.popleft()
        if arrived is not None:
            arrived.synchronize()
        self.buffers.put(buffer)

    def clear(self) -> None:
        """Free all buffers once no thread and no copy uses them."""
        while self.in_flight:
            self.arrive()
        while self.reading:
            reading, _, buffer = self.reading.popleft()
            reading.exception()
            self.buffers.put(buffer)
