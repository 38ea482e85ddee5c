"""Loads a checkpoint's tensors to a device in parts: reads and copies overlap."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

from requant.checkpoint.reader import TensorInfo, cut, opened, read_part
from requant.runtime.pinned_memory import locked

# Bytes of a part, whole numbers of any dtype. Many small ones take the interpreter from who starts a GPU's work.
PLACE = 2**25
PLACES = 4


class Carrier:
    """Brings tensors from their files to `device`, through a few places of page-locked memory that are used again.

    Several threads may ask at once. A tensor is never whole on the host: its pages there would be paid for twice, when they
    are filled and when they are given back.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.readers = ThreadPoolExecutor(PLACES)
        self.places: SimpleQueue[Tensor | None] = SimpleQueue()
        for _ in range(PLACES):
            self.places.put(None)  # made when it is needed

    def bring(self, info: TensorInfo, dtype: torch.dtype) -> Tensor:
        """A tensor on the device, in the shape of its file, for the stream that is current.

        Raises StageError when the file has changed or cannot be read.
        """
        whole = torch.empty(info.shape, dtype=dtype, device=self.device)
        way = _Way(self.places, whole.view(-1), info.dtype)
        with opened(info) as file:
            try:
                for part in cut(info.nbytes, PLACE):
                    place = way.place()
                    here = place[: part.stop - part.start]
                    way.reading.append((self.readers.submit(read_part, file, info, part, here), part, place))
                while way.reading:
                    way.send()
            finally:
                way.clear()
        return whole


class _Way:
    """One tensor's parts: those being read, and those that have left for `whole` but may not have arrived."""

    def __init__(self, places: SimpleQueue[Tensor | None], whole: Tensor, stored: torch.dtype) -> None:
        self.places, self.whole, self.stored = places, whole, stored
        self.reading: deque[tuple[Future[None], slice, Tensor]] = deque()
        self.away: deque[tuple[Any, Tensor]] = deque()

    def place(self) -> Tensor:
        """A free place. Who holds any waits for none of those that others hold."""
        while True:
            try:
                place = self.places.get(block=not self.reading and not self.away)
            except Empty:
                self.send() if self.reading else self.arrive()
                continue
            try:
                return locked(PLACE) if place is None else place
            except BaseException:
                self.places.put(None)
                raise

    def send(self) -> None:
        """Wait until the first part is read, and let it go; the one before it makes its place free."""
        reading, part, place = self.reading[0]
        reading.result()
        numbers = place[: part.stop - part.start].view(self.stored)
        first = part.start // self.stored.itemsize
        if self.stored != self.whole.dtype:
            numbers = numbers.to(self.whole.device, non_blocking=True)  # it converts, not the host
        self.whole[first : first + len(numbers)].copy_(numbers, non_blocking=True)
        self.reading.popleft()
        arriving = torch.cuda.current_stream(self.whole.device).record_event() if self.whole.is_cuda else None
        self.away.append((arriving, place))
        if len(self.away) > 1:
            self.arrive()

    def arrive(self) -> None:
        arrived, place = self.away.popleft()
        if arrived is not None:
            arrived.synchronize()
        self.places.put(place)

    def clear(self) -> None:
        """Give all places back, once nobody writes to or reads from them."""
        while self.away:
            self.arrive()
        while self.reading:
            reading, _, place = self.reading.popleft()
            reading.exception()
            self.places.put(place)
