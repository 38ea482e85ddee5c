"""What the solver returns for one weight: codes, scales, errors and losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from requant.numerics.grid import Grid, Scales, dequantize_codes

Order = Literal["natural", "activation", "group"]
_PART = 2**24  # values of a checksum at a time: each takes 8 bytes
_ODD = 0x9E3779B97F4A7C15 - 2**64


def checksum(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """A number below 2^48 that depends on every code, scale and zero point and its place; fp64 [] on the device.

    codes: uint8 [rows, n]. scale, zero: fp32 [rows, groups], by their bits. Whole numbers only: every device and every
    order of the sums gives the same one. One value that differs always changes it; it is no defence against malice.
    """
    total = torch.zeros((), dtype=torch.int64, device=codes.device)
    for values in (codes, scale.contiguous().view(torch.int32), zero.contiguous().view(torch.int32)):
        total = total * _ODD + _weighted_sum(values)
    return (total & (2**48 - 1)).double()


def _weighted_sum(values: Tensor) -> Tensor:
    """Sum of integers [rows, n], each times an odd number of its place; int64 [], modulo 2^64."""
    rows, columns = (_odd_numbers(n, values.device) for n in values.shape)
    step = max(1, _PART // values.shape[1])
    parts = (
        ((values[i : i + step].long() * columns).sum(dim=1) * rows[i : i + step]).sum()
        for i in range(0, len(values), step)
    )
    return torch.stack(list(parts)).sum()


def _odd_numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, device=device).mul_(_ODD).bitwise_right_shift(7).bitwise_or_(1)


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The result for one weight, or for several weights one below the other (`split`).

    All have the same input and grid.
    errors: fp32 [3, rows]: diag(E H E') of the result, of rounding to nearest on min-max scales, and diag(W H W').
    rounded: bool [rows], rows where rounding to nearest on the same scales lost less and was taken.
    """

    codes: Tensor  # uint8 [rows, n]
    scales: Scales
    grid: Grid
    errors: Tensor
    rounded: Tensor
    damp: float
    order: Order
    uncoupled: bool

    def weight(self) -> Tensor:
        """fp32 [rows, n], exactly what a server dequantizes."""
        return dequantize_codes(self.codes, self.scales)

    def split(self, sizes: Sequence[int]) -> list[Solution]:
        """One Solution for each of `sizes` rows."""
        stops = torch.tensor([0, *sizes]).cumsum(0).tolist()
        return [self._select(slice(a, b)) for a, b in itertools.pairwise(stops)]

    def _select(self, rows: slice) -> Solution:
        scales, errors = self.scales.select(rows), self.errors[:, rows]
        return replace(self, codes=self.codes[rows], scales=scales, errors=errors, rounded=self.rounded[rows])

    def checksum(self) -> Tensor:
        """`checksum` of the codes, scales and zero points."""
        return checksum(self.codes, self.scales.scale, self.scales.zero)

    def sums(self) -> Tensor:
        """What `Losses.of` needs, fp32 [4] on the device; nothing waits for the device."""
        return torch.cat([self.errors.sum(dim=1), self.rounded.float().mean()[None]])

    def losses(self) -> Losses:
        """The losses as numbers; waits for the device."""
        return Losses.of(self.sums().tolist(), uncoupled=self.uncoupled)

    @property
    def loss(self) -> float:
        """tr(E H E') against the undamped Hessian."""
        return self.losses().loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Squared errors of a solution and of its references, in the norm of the Hessian.

    uncoupled: no factor was found. loss: tr(E H E') of the solution; nearest: of rounding to nearest on min-max scales.
    whole: tr(W H W'). rounded: share of rows that were rounded to nearest.
    """

    uncoupled: bool
    loss: float
    nearest: float
    whole: float
    rounded: float

    @classmethod
    def of(cls, sums: Sequence[float], *, uncoupled: bool) -> Losses:
        """From the numbers of `Solution.sums`."""
        loss, nearest, whole, rounded = sums
        return cls(uncoupled=uncoupled, loss=loss, nearest=nearest, whole=whole, rounded=rounded)

    @property
    def relative(self) -> float:
        """sqrt(tr(E H E') / tr(W H W'))."""
        return self._relative(self.loss)

    @property
    def rtn_relative(self) -> float:
        """The same for rounding to nearest on min-max scales."""
        return self._relative(self.nearest)

    @property
    def fallback(self) -> bool:
        """Whether this is no better than rounding."""
        return self.uncoupled or self.rounded > 0.5

    def _relative(self, loss: float) -> float:
        return math.sqrt(max(loss, 0.0) / max(self.whole, torch.finfo(torch.float32).tiny))
