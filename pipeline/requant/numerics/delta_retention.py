"""How much of an adapter's delta is left after rounding, and its signal to noise.

With W = D + dW the merged weight, Q what is stored for it and E = Q - W, on inputs whose second moment is H:

    signal to noise    tr(dW H dW') / tr(E H E')             below 1 the error is larger than what training added
    retention          <Q - D, dW> / <dW, dW>                1: the whole delta is in Q, 0: nothing of it is
    output retention   tr((Q - D) H dW') / tr(dW H dW')      the same for the delta's output
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Delta:
    """What the adapter adds to one weight, fp32 [rows, n], as low-rank factors.

    `left @ right` of rank r, or `left` alone when it has no factors.
    """

    left: Tensor
    right: Tensor | None = None

    def to(self, device: torch.device) -> Delta:
        return Delta(self.left.to(device), None if self.right is None else self.right.to(device))

    def rows(self, which: Tensor) -> Delta:
        """The delta of some rows (int64)."""
        return Delta(self.left[which], self.right)

    def dense(self) -> Tensor:
        return self.left if self.right is None else self.left @ self.right

    def inner(self, other: Tensor) -> Tensor:
        """<other, dW>, fp64 [] on the device, other fp32 [rows, n].

        Costs a product with r columns, not n.
        """
        return _sum(other, self.left) if self.right is None else _sum(other @ self.right.T, self.left)

    def square(self, hessian: Tensor | None = None) -> Tensor:
        """tr(dW H dW'), or <dW, dW> without `hessian` (symmetric, [n, n]); fp64 [] on the device."""
        if self.right is None:
            return _sum(self.left, self.left if hessian is None else self.left @ hessian)
        right = self.right if hessian is None else self.right @ hessian
        return _sum(self.left.T @ self.left, self.right @ right.T)

    def through(self, hessian: Tensor) -> Delta:
        """dW H, by its factors."""
        return Delta(self.left @ hessian) if self.right is None else Delta(self.left, self.right @ hessian)


Deltas = Callable[[str], Delta | None]
"""Name of a tensor of the merged checkpoint -> what the adapter added to it, None where it added nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaRetention:
    """Retention and signal to noise of one module's delta, as defined at the top of the file.

    delta_norm: sqrt(<dW, dW>). signal: tr(dW H dW'), H a mean per token.

    signal_to_noise is None when the error is exactly zero, the retentions when the delta is.
    """

    delta_norm: float
    signal: float
    signal_to_noise: float | None
    retention: float | None
    output_retention: float | None

    @staticmethod
    def of(measured: Sequence[float], noise: float) -> DeltaRetention:
        """From the four numbers of `measure`, and tr(E H E') of the same error."""
        square, signal, inner, through = max(measured[0], 0.0), max(measured[1], 0.0), *measured[2:]
        return DeltaRetention(
            delta_norm=square**0.5,
            signal=signal,
            signal_to_noise=signal / noise if noise > 0 else None,
            retention=1 + inner / square if square > 0 else None,
            output_retention=1 + through / signal if signal > 0 else None,
        )


def measure(delta: Delta, error: Tensor, hessian: Tensor) -> Tensor:
    """The numbers for `DeltaRetention.of`, fp64 [4] on the device; nothing waits for the device.

    They are <dW, dW>, tr(dW H dW'), <E, dW>, tr(E H dW').
    error: E = Q - W, fp32 [rows, n]. hessian: symmetric fp32 [n, n], undamped.
    """
    through = delta.through(hessian).inner(error)
    return torch.stack([delta.square(), delta.square(hessian), delta.inner(error), through])


def delta_retention(delta: Delta, error: Tensor, hessian: Tensor, noise: float) -> DeltaRetention:
    """The numbers of one module; waits for the device. noise: tr(E H E')."""
    return DeltaRetention.of(measure(delta, error, hessian).tolist(), noise)


def _sum(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dtype=torch.float64)
