"""Work on tensors of fixed shapes as a CUDA graph.

One launch, where thousands take longer than what they launch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)
WARM_UPS = 2  # runs before the capture: libraries load and choose their kernels in them


class CudaGraph:
    """A function whose kernels were captured once and are replayed by every call.

    All tensors that it reads or writes beside its inputs keep their place. Its result is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., Any], *inputs: Tensor, device: torch.device) -> None:
        """Run the function WARM_UPS times, then capture it; raises RuntimeError where it cannot be captured."""
        self.inputs = [value.clone() for value in inputs]
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    function(*self.inputs)
        finally:  # what was launched before an error still writes to tensors that are about to be freed
            current.wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self.graph):
                self.result = function(*self.inputs)
        except RuntimeError:
            _renew_random_state(device)
            raise

    def __call__(self, *inputs: Tensor) -> Any:
        """The result for inputs of the captured shapes."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.result


def _renew_random_state(device: torch.device) -> None:
    """Give the device's generator a state of its own: a capture that failed leaves the old one as in a capture."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with suppress(RuntimeError, AttributeError, IndexError):
        torch.cuda.default_generators[index].graphsafe_set_state(
            torch.Generator(device).manual_seed(torch.initial_seed())
        )


def captured(function: Callable[..., Any], *inputs: Tensor, device: torch.device) -> Callable[..., Any]:
    """The function as a CUDA graph; itself where it cannot be captured.

    It may have run some times before this returns.
    """
    try:
        return CudaGraph(function, *inputs, device=device)
    except RuntimeError as error:
        log.info("kernels are launched one by one, since they cannot be captured: %s", str(error).partition("\n")[0])
        return function


def capture_on(device: torch.device) -> Callable[..., CudaGraph] | None:
    """How a function becomes one launch on a device; None: not on this type."""
    return partial(CudaGraph, device=device) if device.type == "cuda" else None
