"""The Cholesky factor of a Hessian, which everything that is solved needs first. Tensors only.

A GPU has little to do while it factors: each column of blocks waits for the one before it. So it can be begun beside what
does not need the factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

Cholesky = Callable[[Tensor], tuple[Tensor, Tensor]]
MAX_DAMP = 0.64


class NotFinite(ValueError):
    """A Hessian holds NaN or infinity."""


@dataclass(frozen=True, slots=True)
class Factor:
    """Cholesky factor of the permuted, damped Hessian: lower @ lower.T = H[order, order] + damp * mean(diag H) * I.

    lower: fp32 [n, n]. order: int64 [n]; its last column is rounded first. `diagonal` when no factor was found: `lower`
    is then the identity, and nothing is compensated.
    """

    lower: Tensor
    order: Tensor
    damp: float
    diagonal: bool = False


def factorize(hessian: Tensor, order: Tensor, damp: float, cholesky: Cholesky = torch.linalg.cholesky_ex) -> Factor:
    """Factor H for rounding its columns in `order` (int64 [n], first to last). hessian: fp32 [n, n], symmetric.

    Doubles `damp` up to 0.64, then gives up coupling. Raises NotFinite.
    cholesky: gives (lower, info) as torch's does, and may use up its argument.
    """
    return Factoring(hessian, order, damp, cholesky).result()


class Factoring:
    """`factorize` under way: on a GPU beside what the caller gives it to do next, until `result` is asked for.

    The Hessian must stay as it is until then.
    """

    def __init__(
        self, hessian: Tensor, order: Tensor, damp: float, cholesky: Cholesky = torch.linalg.cholesky_ex
    ) -> None:
        self.hessian, self.damp, self.cholesky = hessian, damp, cholesky
        self.backwards, self.mean = order.flip(0), hessian.diagonal().mean()
        self.side = _side(hessian.device) if hessian.is_cuda else None
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(hessian.device))
        self.lower, self.info = self._try()

    def result(self) -> Factor:
        """The factor, for the stream that is current; the host waits for it, and for nothing that was begun after it."""
        with self._beside():
            mean = float(self.mean)
            if not math.isfinite(mean):
                raise NotFinite("the Hessian holds NaN or infinity")
            found = mean > 0 and int(self.info) == 0
            while mean > 0 and not found and 2 * self.damp <= MAX_DAMP:
                self.damp *= 2
                self.lower, self.info = self._try()
                found = int(self.info) == 0
        if not found:
            return Factor(torch.eye(len(self.backwards), device=self.hessian.device), self.backwards, self.damp, True)
        if self.side is not None:  # the host has waited for it: no stream need
            self.lower.record_stream(torch.cuda.current_stream(self.hessian.device))
        return Factor(self.lower, self.backwards, self.damp)

    def _try(self) -> tuple[Tensor, Tensor]:
        with self._beside():
            damped = self.hessian[self.backwards[:, None], self.backwards]
            damped.diagonal().add_(self.damp * self.mean)
            return self.cholesky(damped)

    def _beside(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.side is None else torch.cuda.stream(self.side)


@cache
def _side(device: torch.device) -> Any:
    """One stream for all factorizations: memory that was used on it is used again. What is small goes first."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
