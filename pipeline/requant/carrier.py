"""A checkpoint's tensors on their way to a device: in parts, some of which are read while others travel."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from requant.checkpoint import READERS, TensorInfo, cut, read_part
from requant.staging import locked

PLACE = 2**24  # bytes of a part


class Carrier:
    """Brings tensors from their files to `device`, through READERS places of page-locked memory that are used again.

    Several threads may ask at once. A tensor is never whole on the host: its pages there would be paid for twice, when they
    are filled and when they are given back.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = ThreadPoolExecutor(READERS)
        self._places: SimpleQueue[Tensor | None] = SimpleQueue()
        for _ in range(READERS):
            self._places.put(None)  # made when it is needed

    def bring(self, info: TensorInfo) -> Tensor:
        """A tensor on the device, in the dtype and shape of its file, for the stream that is current.

        Raises StageError when the file has changed or cannot be read.
        """
        whole = torch.empty(info.nbytes, dtype=torch.uint8, device=self.device)
        stream = torch.cuda.current_stream(self.device) if whole.is_cuda else None
        parts = cut(info.nbytes, PLACE)
        bring = partial(self._bring, info, whole, stream)
        if len(parts) > 1:
            list(self._pool.map(bring, parts))
        elif parts:
            bring(parts[0])
        return whole.view(info.dtype).reshape(info.shape)

    def _bring(self, info: TensorInfo, whole: Tensor, stream: Any, part: slice) -> None:
        place = self._places.get()
        try:
            if place is None:
                place = locked(PLACE)
            here = place[: part.stop - part.start]
            read_part(info, part, here)
            with torch.cuda.stream(stream):  # none on a CPU
                whole[part].copy_(here, non_blocking=True)
                arrived = None if stream is None else stream.record_event()
            if arrived is not None:
                arrived.synchronize()  # then the place is free again
        finally:
            self._places.put(place)
