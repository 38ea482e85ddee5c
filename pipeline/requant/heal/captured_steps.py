"""Gradient and rounding of a student's steps as CUDA graphs.

Small models wait for launches more than for what is launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformers import masking_utils

from requant.heal.end_to_end import EndToEndLoss
from requant.runtime.cuda_graph import captured


class CapturedSteps:
    """What a step does on the GPU beside the optimizer's update, captured when it is first asked for.

    A model that cannot be captured runs as without.
    """

    def __init__(self, loss: EndToEndLoss) -> None:
        self.loss, self.student, self.device = loss, loss.student, loss.device
        self._windows = 0  # in a captured call
        self._gradient: Callable[..., Any] | None = None
        self._refresh: Callable[[], Any] | None = None

    def add_gradient(self, numbers: Sequence[int], count: int) -> float:
        """Add the gradient of the loss of these of `count` windows; returns their share of the loss.

        `count` is the same in every call; before the first one all gradients are zero. Another number of windows than
        in the first call runs kernel by kernel.
        """
        inputs = self.loss.inputs(numbers)
        if self._windows not in (0, len(numbers)):
            return float(self._add(count, *inputs))
        if self._gradient is None:
            self._windows = len(numbers)
            with one_sequence_a_window():
                self._gradient = captured(partial(self._add, count), *inputs, device=self.device)
            for vector in self.student.trainable:  # what the runs before the capture have added
                assert vector.offset.grad is not None
                vector.offset.grad.zero_()
        return float(self._gradient(*inputs))

    def _add(self, count: int, *inputs: Tensor) -> Tensor:
        loss = self.loss.of(*inputs) / count
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def refresh(self) -> None:
        """Compute the values in use from their offsets."""
        if self._refresh is None:
            self._refresh = captured(self.student.refresh, device=self.device)
        self._refresh()


@contextmanager
def one_sequence_a_window() -> Iterator[None]:
    """Context in which transformers takes every window for one sequence, as it is.

    It would wait for the positions to find that out.
    """
    found = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = found
