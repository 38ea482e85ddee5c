"""Quantization grids: bits, groups, scales and zeros, and the search for scales."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from requant.numerics import triton_kernels
from requant.runtime.device import profile_of

Search = Literal["hessian", "minmax"]


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that a weight may take.

    `bits` wide codes, one scale (and zero) for each `group_size` inputs of a row.
    group_size -1 means one group a row. `signed` allows negative scales, so that the wide side of the symmetric
    range (-2^(b-1)) can serve the larger tail. `search` picks the scale: `hessian` minimises the error weighted by
    the Hessian's diagonal, `minmax` spans the largest weight.
    """

    bits: int = 4
    group_size: int = 128
    _: KW_ONLY
    symmetric: bool = True
    signed: bool = False
    search: Search = "hessian"

    @property
    def levels(self) -> int:
        return 1 << self.bits

    def groups(self, columns: int) -> int:
        """Number of groups in a row of `columns` inputs."""
        return 1 if self.group_size == -1 else columns // self.group_size


def deployable(scale: Tensor) -> Tensor:
    """The nearest value that is exact in both bfloat16 and float16, and not zero.

    fp32 in and out: the value that every server will use.
    """
    rounded = scale.bfloat16().half().float()
    smallest = torch.full_like(rounded, 2.0**-24)
    return torch.where(rounded == 0, torch.where(scale < 0, -smallest, smallest), rounded)


@dataclass(frozen=True, slots=True)
class Scales:
    """scale fp32 [rows, groups], already deployable; zero fp32 [rows, groups], integers."""

    scale: Tensor
    zero: Tensor

    def select(self, rows: slice | Tensor) -> Scales:
        return Scales(self.scale[rows], self.zero[rows])


def find_scales(weight: Tensor, importance: Tensor, grid: Grid) -> Scales:
    """Choose every group's scale on the original weights, before the column loop.

    weight: fp32 [rows, n]. importance: fp32 [n], the Hessian's diagonal (floored by the damping).
    Minimises sum_j importance_j (w_j - s (clip(round(w_j / s) + z) - z))^2 over a coarse-to-fine list of
    shrunk ranges; `minmax` takes the full range.
    """
    rows, columns = weight.shape
    groups = grid.groups(columns)
    step = max(1, profile_of(weight.device).search_elements // columns)
    parts = [
        _search(weight[i : i + step].reshape(-1, groups, columns // groups), importance.reshape(groups, -1), grid)
        for i in range(0, rows, step)
    ]
    return Scales(torch.cat([p.scale for p in parts]), torch.cat([p.zero for p in parts]))


def _range_scales(grid: Grid, low: Tensor, high: Tensor, shrink: Tensor) -> Scales:
    """Scale and zero that span [low, high] * shrink.

    The sign of `shrink` becomes the scale's when symmetric.
    """
    if grid.symmetric:
        half = grid.levels // 2
        largest = torch.maximum(-low, high)
        denominator = half - 0.5 if grid.search == "minmax" else float(half)
        return Scales(deployable(largest * shrink / denominator), torch.full_like(low, half))
    scale = deployable((high - low) * shrink.abs() / (grid.levels - 1))
    # A zero of 0 cannot be stored minus one (format v1) without a borrow from its neighbour: 1 is the least.
    return Scales(scale, torch.round(-low * shrink.abs() / scale).clamp(1, grid.levels - 1))


def shrinks(grid: Grid) -> tuple[Tensor, Tensor]:
    """The shares of a group's range that the search tries, and the offsets around the best of them; fp32.

    The largest share is the one at which the short side of a symmetric grid reaches the largest weight: 2 at 2 bits,
    1.33 at 3, 1.14 at 4.
    """
    half = grid.levels // 2
    high = max(1.1, half / (half - 1)) if grid.symmetric else 1.1
    coarse = torch.linspace(high, 0.42, 1 + round((high - 0.42) / 0.0567))
    fine = (coarse[0] - coarse[1]) * torch.tensor((-0.75, -0.5, -0.25, 0.25, 0.5, 0.75))
    return (torch.cat([coarse, -coarse]) if grid.signed else coarse), fine


def _search(weight: Tensor, importance: Tensor, grid: Grid) -> Scales:
    """weight [rows, groups, g] -> the best Scales [rows, groups]."""
    low, high = weight.amin(dim=2).clamp(max=0), weight.amax(dim=2).clamp(min=0)
    if grid.search == "minmax":
        return _range_scales(grid, low, high, torch.ones_like(low))
    coarse, fine = (values.to(weight.device) for values in shrinks(grid))
    if triton_kernels.usable(weight):
        shrink = triton_kernels.search(weight, importance, coarse, fine, symmetric=grid.symmetric, levels=grid.levels)
        return _range_scales(grid, low, high, shrink)
    best = torch.full_like(low, torch.inf)
    shrink = torch.ones_like(low)
    root = importance.sqrt()
    for value in coarse.tolist():
        best, shrink = _try(weight, root, grid, (low, high), torch.full_like(low, value), best, shrink)
    centre = shrink
    for offset in fine.tolist():
        best, shrink = _try(weight, root, grid, (low, high), centre + offset, best, shrink)
    return _range_scales(grid, low, high, shrink)


def _try(
    weight: Tensor,
    root: Tensor,
    grid: Grid,
    ends: tuple[Tensor, Tensor],
    candidate: Tensor,
    best: Tensor,
    shrink: Tensor,
) -> tuple[Tensor, Tensor]:
    """Keep `candidate` wherever its weighted error is smaller than `best`.

    root: of the importance.

    Clamping between numbers and a norm: between tensors, and with a weighted sum, it takes four times as long on a CPU.
    """
    scales = _range_scales(grid, *ends, candidate)
    scale, zero = scales.scale[..., None], scales.zero[..., None]
    error = (weight / scale).round_().add_(zero).clamp_(0, grid.levels - 1).sub_(zero).mul_(scale).sub_(weight)
    loss = torch.linalg.vector_norm(error.mul_(root), dim=-1)
    better = loss < best
    return torch.where(better, loss, best), torch.where(better, candidate, shrink)


def rounded_rows(weight: Tensor, grid: Grid, elements: int = 2**24) -> tuple[Tensor, Scales]:
    """A weight of any float dtype [rows, n], rounded to nearest with no calibration: codes uint8, and its scales.

    elements: of the fp32 copy that is made at a time.
    """
    importance = torch.ones(weight.shape[1], device=weight.device)
    codes, found = list[Tensor](), list[Scales]()
    for part in torch.split(weight, max(1, elements // weight.shape[1])):
        whole = part.float().contiguous()
        found.append(find_scales(whole, importance, grid))
        codes.append(round_to_grid(whole, found[-1], grid))
    return torch.cat(codes), Scales(torch.cat([s.scale for s in found]), torch.cat([s.zero for s in found]))


def nearest_rows(weight: Tensor, grid: Grid, elements: int = 2**24) -> Tensor:
    """What the codes of `rounded_rows` say, fp32 [rows, n]."""
    parts = torch.split(weight, max(1, elements // weight.shape[1]))
    return torch.cat([dequantize_codes(*rounded_rows(part, grid, elements)) for part in parts])


def round_to_grid(weight: Tensor, scales: Scales, grid: Grid) -> Tensor:
    """Round to nearest: fp32 [rows, n] -> codes uint8 [rows, n]."""
    width = weight.shape[1] // scales.scale.shape[1]
    scale, zero = (t.repeat_interleave(width, dim=1) for t in (scales.scale, scales.zero))
    return (weight / scale).round_().add_(zero).clamp_(0, grid.levels - 1).to(torch.uint8)


def dequantize_codes(codes: Tensor, scales: Scales) -> Tensor:
    """codes [rows, n] -> fp32 [rows, n]: scale * (code - zero)."""
    width = codes.shape[1] // scales.scale.shape[1]
    scale, zero = (t.repeat_interleave(width, dim=1) for t in (scales.scale, scales.zero))
    return (codes.float() - zero) * scale


def nearest(weight: Tensor, scales: Scales, grid: Grid) -> Tensor:
    """The weight on its grid, rounded to nearest: fp32 [rows, n] -> fp32 [rows, n]."""
    return dequantize_codes(round_to_grid(weight, scales, grid), scales)
