"""Stores hidden states of all batches between blocks, on the device or in pinned memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from requant.runtime.pinned_memory import use_stream


class HiddenStateStore:
    """Hidden states on their device or, `on_host`, in pinned host memory.

    Copies from and to the host overlap with the computation of the batches before and after. Nothing waits for the GPU.
    """

    def __init__(self, device: torch.device, *, on_host: bool = False) -> None:
        self.device, self.on_host = device, on_host and device.type == "cuda"
        self._side: Any = torch.cuda.Stream(device) if self.on_host else None  # type: ignore[no-untyped-call]
        self._sum = torch.zeros((), device=device)

    def put(self, value: Tensor, old: Tensor | None = None) -> Tensor:
        """Store `value` (on the device), in the memory of `old` on the host: the stored tensor."""
        self._sum += value.sum(dtype=torch.float32)  # the cheapest that no NaN or infinity leaves finite
        if self._side is None:
            return value
        place = torch.empty(value.shape, dtype=value.dtype, pin_memory=True) if old is None else old
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with use_stream(self._side):
            place.copy_(value, non_blocking=True)
        value.record_stream(self._side)
        return place

    def take(self, kept: Sequence[Tensor]) -> Iterator[Tensor]:
        """The kept tensors on the device, one after another, the next one under way."""
        if self._side is None:
            yield from kept
            return
        coming = self._fetch(kept[0]) if kept else None
        for following in [*kept[1:], None]:
            if coming is None:
                return
            value, arrived = coming
            coming = None if following is None else self._fetch(following)
            torch.cuda.current_stream(self.device).wait_event(arrived)
            yield value

    def total(self) -> Tensor:
        """Sum of all stored values, fp32 [] on the device: finite if all are (and below 3e38)."""
        return self._sum.clone()

    def _fetch(self, kept: Tensor) -> tuple[Tensor, Any]:
        value = torch.empty_like(kept, device=self.device)
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        with use_stream(self._side):
            value.copy_(kept, non_blocking=True)
        return value, self._side.record_event()
