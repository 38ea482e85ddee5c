"""GPTQ: factor, solve, refine. Tensors in, tensors out, nothing else.

Frantar et al., GPTQ (arXiv:2210.17323), in its equal LDLQ form (Chee et al., QuIP, arXiv:2307.13304, theorem 6):
with H = L D L', L unit lower triangular, the columns are rounded from the last to the first,

    target_j = W_j + sum_{i>j} (W_i - Q_i) L_ij,     Q_j = round(target_j),     loss = sum_j (target_j - Q_j)^2 D_j

which needs one Cholesky factorization where the usual route needs two and an inverse. Matrices of weights, codes and
errors are kept columns first, [n, rows], so that a column of the weight is contiguous.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from requant.numerics import triton_kernels
from requant.numerics.blocks import blocks_of
from requant.numerics.grid import Grid, Scales, dequantize_codes, find_scales, nearest, round_to_grid
from requant.numerics.solution import Order, Solution
from requant.runtime.device import profile_of

Cholesky = Callable[[Tensor], tuple[Tensor, Tensor]]
MAX_DAMP = 0.64
_ROWS = 8192  # of a weight at a time, where only sums are needed


def column_order(diagonal: Tensor, order: Order, group_size: int) -> Tensor:
    """Order in which columns are rounded, int64 [n]; the stored layout does not depend on it.

    activation: largest Hessian diagonal first. group: groups by their mean diagonal, and inside each likewise (GAR).
    """
    n = diagonal.numel()
    if order == "natural":
        return torch.arange(n, device=diagonal.device)
    if order == "activation" or group_size == -1:
        return torch.argsort(diagonal, descending=True, stable=True)
    table = diagonal.reshape(-1, group_size)
    inside = torch.argsort(table, dim=1, descending=True, stable=True)
    groups = torch.argsort(table.mean(dim=1), descending=True, stable=True)
    return (inside + torch.arange(table.shape[0], device=diagonal.device)[:, None] * group_size)[groups].reshape(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """Cholesky factor of the permuted, damped Hessian.

    lower @ lower.T = H[order, order] + damp * mean(diag H) * I.
    lower: fp32 [n, n]. order: int64 [n]; its last column is rounded first. mean: of H's diagonal.
    diagonal: no factor was found; `lower` is the identity, and no column compensates another's error.
    """

    lower: Tensor
    order: Tensor
    damp: float
    mean: float
    diagonal: bool = False


def damping(asked: float | None, tokens: int, n: int) -> float:
    """The damping asked for, or 0.02 with at least 64 tokens for each of `n` inputs, else 0.05."""
    if asked is not None:
        return asked
    return 0.02 if tokens >= 64 * n else 0.05


def factorize(hessian: Tensor, order: Tensor, damp: float, cholesky: Cholesky = torch.linalg.cholesky_ex) -> Factor:
    """Factor H for rounding its columns in `order` (int64 [n], first to last).

    hessian: fp32 [n, n], symmetric.

    Doubles `damp` up to 0.64, then takes the identity (`diagonal`). Raises FloatingPointError when the Hessian is not
    finite. cholesky: returns (lower, info) as torch's does, and may overwrite its argument.
    """
    mean = float(hessian.diagonal().mean())
    if not math.isfinite(mean):
        raise FloatingPointError("the Hessian holds NaN or infinity")
    backwards = order.flip(0)
    while mean > 0:
        damped = hessian[backwards[:, None], backwards]
        damped.diagonal().add_(damp * mean)
        lower, info = cholesky(damped)
        if int(info) == 0:
            return Factor(lower=lower, order=backwards, damp=damp, mean=mean)
        if 2 * damp > MAX_DAMP:
            break
        damp *= 2
    return Factor(
        lower=torch.eye(len(order), device=hessian.device), order=backwards, damp=damp, mean=mean, diagonal=True
    )


def solve(weight: Tensor, factor: Factor, scales: Scales, grid: Grid) -> tuple[Tensor, Tensor]:
    """The column loop of GPTQ: codes uint8 [n, rows] and the error of a weight.

    weight: fp32 [rows, n]. The error is (W - Q)', fp32 [n, rows], with columns as in W.
    A block of columns gets the feedback of all columns rounded before it by matrix products: first of those outside of
    its `DeviceProfile.gptq_outer` columns, then of those inside. Its own columns follow one after another. The sizes
    change nothing beyond fp32 rounding.
    """
    n = weight.shape[1]
    # (n, rows), the first column to round at the end; a column holds the weight until it is rounded
    error = weight.T[factor.order]
    group = factor.order // (n // scales.scale.shape[1])
    scale, zero = scales.scale.T.contiguous(), scales.zero.T.contiguous()
    pivots = factor.lower.diagonal()
    codes = torch.empty_like(error, dtype=torch.uint8)
    fused = triton_kernels.usable(weight)
    loop = triton_kernels.round_columns if fused else _round_columns
    for outer in reversed(blocks_of(n, profile_of(weight.device).gptq_outer)):
        width = outer.stop - outer.start
        into = error.new_empty(n - outer.start, width) if fused else None  # row-major: torch's factor is column-major
        unit = torch.div(factor.lower[outer.start :, outer], pivots[outer], out=into)  # these columns of L
        wide = torch.addmm(error[outer], unit[width:].T, error[outer.stop :])
        for here in reversed(blocks_of(width, profile_of(weight.device).gptq_block)):
            target, feedback = wide[here], unit[here, here]
            if here.stop < width:
                target.addmm_(unit[here.stop : width, here].T, error[outer.start + here.stop : outer.stop])
            own = slice(outer.start + here.start, outer.start + here.stop)
            loop(
                target,
                feedback,
                triton_kernels.Block(
                    scale=scale, zero=zero, group=group[own], levels=grid.levels, error=error[own], codes=codes[own]
                ),
            )
    back = torch.argsort(factor.order)
    return codes.index_select(0, back), error.index_select(0, back)


def _round_columns(target: Tensor, feedback: Tensor, block: triton_kernels.Block) -> None:
    """Round the columns of one block, last first.

    target: [k, rows]. feedback: [k, k], of L. block.error: the weight.
    """
    scale, zero = block.scale[block.group], block.zero[block.group]
    low, high = -zero, block.levels - 1 - zero
    backwards = feedback.T.contiguous()
    code = torch.empty_like(target[0])
    for j in range(len(target) - 1, -1, -1):
        wanted = torch.addmv(target[j], block.error[j + 1 :].T, backwards[j, j + 1 :])
        torch.div(wanted, scale[j], out=code)
        code.round_()
        torch.clamp(code, low[j], high[j], out=code)
        block.error[j].addcmul_(code, scale[j], value=-1)
        block.codes[j] = code.add_(zero[j])


def refine(
    codes: Tensor, error: Tensor, hessian: Tensor, ridge: float, scales: Scales, grid: Grid, sweeps: int
) -> None:
    """Coordinate descent on a solution of `solve`, in place, `sweeps` times over all columns.

    hessian: contiguous.

    Each column gets its best codes given the errors of all others, q_j = round(q_j + (E H)_j / H_jj) with
    H = hessian + ridge * I, so tr(E H E') never grows. The column loop can only compensate columns rounded before.
    Source: Behdin et al., QuantEase (arXiv:2309.01885).
    """
    n = codes.shape[0]
    group = torch.arange(n, device=codes.device) // (n // scales.scale.shape[1])
    scale, zero = scales.scale.T.contiguous(), scales.zero.T.contiguous()
    sweep = triton_kernels.sweep_columns if triton_kernels.usable(error) else _sweep_columns
    inverse = 1 / (hessian.diagonal() + ridge)
    for outer in blocks_of(n, profile_of(codes.device).gptq_outer) * sweeps:
        wide = torch.addmm(error[outer], hessian[outer], error, beta=ridge)  # (E H)', these columns
        for part in blocks_of(outer.stop - outer.start, profile_of(codes.device).gptq_block):
            here, pull = slice(outer.start + part.start, outer.start + part.stop), wide[part]
            if part.start:
                pull.addmm_(hessian[here, outer.start : here.start], wide[: part.start])
            block = triton_kernels.Block(
                scale=scale, zero=zero, group=group[here], levels=grid.levels, error=error[here], codes=codes[here]
            )
            sweep(pull, hessian[here, here], inverse[here], block)


def _sweep_columns(pull: Tensor, inside: Tensor, inverse: Tensor, block: triton_kernels.Block) -> None:
    """Set each column of one block to its best code.

    inside: [k, k] of the Hessian. inverse: [k], of its damped diagonal.

    pull: [k, rows], overwritten by the change of each error.
    """
    scale, zero = block.scale[block.group], block.zero[block.group]
    low, high = -zero, block.levels - 1 - zero
    level = block.codes.float().sub_(zero)
    moved = pull  # the same memory: a column's pull is read before its move is written
    for j, step in enumerate(inverse.tolist()):
        wanted = torch.addmv(pull[j], moved[:j].T, inside[j, :j])
        best = torch.addcdiv(level[j], wanted, scale[j], value=step).round_()
        best = torch.clamp(best, low[j], high[j])
        torch.mul(level[j].sub_(best), scale[j], out=moved[j])
        level[j] = best
    block.error.add_(moved)
    block.codes.copy_(level.add_(zero))


def row_errors(error: Tensor, hessian: Tensor) -> Tensor:
    """Squared error of each row, diag(E H E'), fp32 [rows].

    From E' [n, rows] and the undamped, symmetric H [n, n].
    """
    return torch.cat([(hessian @ e).mul_(e).sum(dim=0) for e in torch.split(error, _ROWS, dim=1)])


def output_error(error: Tensor, hessian: Tensor) -> float:
    """tr(E H E') of E fp32 [rows, n]."""
    return float(row_errors(error.T, hessian).sum())


def quantize_weight(
    weight: Tensor, hessian: Tensor, factor: Factor, grid: Grid, *, order: Order = "activation", sweeps: int = 0
) -> Solution:
    """Quantize one weight, fp32 [rows, n], against a Hessian and its factor.

    hessian: fp32 [n, n], symmetric and contiguous.
    Rows do not depend on each other: weights that share their input can be stacked. `order` is only recorded. On a GPU
    the host waits for a result only after all work is launched.
    """
    ridge = factor.damp * factor.mean
    scales = find_scales(weight, hessian.diagonal() + (ridge if factor.mean > 0 else 1.0), grid)
    codes, error = solve(weight, factor, scales, grid)
    if sweeps and factor.mean > 0:
        refine(codes, error, hessian, ridge, scales, grid, sweeps)
    loss = row_errors(error, hessian)
    del error
    control = _rounding_errors(weight, hessian, replace(grid, search="minmax", signed=False))
    codes = codes.T.contiguous()
    rounded = loss > control  # in other rows plain rounding is not tried
    rows = rounded.nonzero()[:, 0]
    if len(rows):
        plain = round_to_grid(weight[rows], scales.select(rows), grid)
        losses = row_errors((weight[rows] - dequantize_codes(plain, scales.select(rows))).T, hessian)
        rounded[rows] = losses < loss[rows]
        codes[rows] = torch.where(rounded[rows, None], plain, codes[rows])
        loss[rows] = torch.minimum(loss[rows], losses)
    errors = torch.stack([loss, control, row_errors(weight.T, hessian)])
    return Solution(
        codes=codes,
        scales=scales,
        grid=grid,
        errors=errors,
        rounded=rounded,
        damp=factor.damp,
        order=order,
        uncoupled=factor.diagonal,
    )


def _rounding_errors(weight: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """diag(E H E') of rounding to nearest on the grid's own scales."""
    parts = []
    for part in torch.split(weight, _ROWS):
        scales = find_scales(part, hessian.diagonal(), grid)
        parts.append(row_errors((part - nearest(part, scales, grid)).T, hessian))
    return torch.cat(parts)


def better_order(
    weights: Sequence[Tensor],
    train: Tensor,
    held: Tensor,
    grid: Grid,
    orders: Sequence[Order],
    damp: float,
    *,
    total: Callable[[float], float] = float,
) -> Order:
    """The column order that loses least on held-out text.

    Solutions are computed on the Hessian `train` and compared on the Hessian `held`.
    weights: fp32 [rows, n] of linears that share their input. total: sums a loss over the ranks, which have other rows.
    Which order is better differs from module to module; servers do not see it.
    """
    importance = train.diagonal() + damp * train.diagonal().mean()
    scales = [find_scales(w, importance, grid) for w in weights]

    def held_loss(order: Order) -> float:
        factor = factorize(train, column_order(train.diagonal(), order, grid.group_size), damp)
        errors = [solve(w, factor, s, grid)[1] for w, s in zip(weights, scales, strict=True)]
        return total(sum(float(row_errors(e, held).sum()) for e in errors))

    return min(orders, key=held_loss)
