"""GPTQ: Hessian, factor, grid, solve. Tensors in, tensors out, nothing else.

Frantar et al., GPTQ (arXiv:2210.17323), in its equal LDLQ form (Chee et al., QuIP, arXiv:2307.13304, theorem 6):
with H = U D U', U unit upper triangular, the columns are rounded left to right,

    target_j = W_j + sum_{i<j} (W_i - Q_i) U_ij,     Q_j = round(target_j),     loss = sum_j (target_j - Q_j)^2 D_j

which needs one Cholesky factorization (of H flipped) where the usual route needs two and an inverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from requant.grid import Grid, Scales, dequantize_codes, find_scales, round_to_grid

Order = Literal["natural", "activation", "group"]
MAX_DAMP = 0.64
BLOCK = 128
_PANEL = 512


def add_to_hessian(hessian: Tensor, inputs: Tensor) -> None:
    """hessian (fp32 [n, n], upper triangle only) += inputs' @ inputs, inputs [..., n]. Panels below the diagonal are skipped."""
    x = inputs.reshape(-1, inputs.shape[-1]).float()
    for start in range(0, x.shape[1], _PANEL):
        stop = start + _PANEL
        hessian[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])


def symmetrize(hessian: Tensor) -> Tensor:
    """Mirror the upper triangle into the lower one, in place."""
    upper = hessian.triu(1)
    return hessian.triu_().add_(upper.T)


def column_order(diagonal: Tensor, order: Order, group_size: int) -> Tensor:
    """Order in which columns are rounded, int64 [n]; it leaves no trace in the result's layout.

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


@dataclass(frozen=True, slots=True)
class Factor:
    """U (unit upper, fp32 [n, n]) of the permuted, damped Hessian; `damp` as used, `diagonal` when no factor was found."""

    upper: Tensor
    order: Tensor
    damp: float
    diagonal: bool = False


def factorize(hessian: Tensor, order: Tensor, damp: float) -> Factor:
    """H[order, order] + damp * mean(diag) * I = U D U'. Doubles `damp` up to 0.64, then gives up coupling (U = I).

    Raises ValueError when the Hessian itself is not finite.
    """
    mean = hessian.diagonal().mean()
    if not torch.isfinite(mean):
        raise ValueError("the Hessian holds NaN or infinity")
    permuted = hessian[order][:, order]
    n = permuted.shape[0]
    while mean > 0:
        damped = permuted.clone()
        damped.diagonal().add_(damp * mean)
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0:
            root = lower.flip(0, 1)
            return Factor(root / root.diagonal(), order, damp)
        if 2 * damp > MAX_DAMP:
            break
        damp *= 2
    return Factor(torch.eye(n, device=hessian.device), order, damp, diagonal=True)


def solve(weight: Tensor, factor: Factor, scales: Scales, grid: Grid) -> Tensor:
    """The column loop: fp32 [rows, n] -> codes uint8 [rows, n] in the weight's own column order.

    Left-looking: each block of 128 columns takes the feedback of all earlier ones in one product, then its columns
    one after another. The block size does not change the result beyond fp32 rounding.
    """
    n = weight.shape[1]
    width = n // scales.scale.shape[1]
    group = factor.order // width
    columns = weight.T[factor.order].contiguous()  # (n, rows): a column of the weight is contiguous
    scale = scales.scale.T[group].contiguous()
    zero = scales.zero.T[group].contiguous()
    low, high = -zero, grid.levels - 1 - zero
    error = torch.empty_like(columns)
    codes = torch.empty_like(columns)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        target = columns[start:stop]
        if start:
            target = torch.addmm(target, factor.upper[:start, start:stop].T, error[:start])
        _solve_block(target, columns, factor.upper, scale, (low, high), error, codes, start)
    codes.add_(zero)
    out = torch.empty_like(codes, dtype=torch.uint8)
    out[factor.order] = codes.to(torch.uint8)
    return out.T.contiguous()


def _solve_block(
    target: Tensor,
    columns: Tensor,
    upper: Tensor,
    scale: Tensor,
    ends: tuple[Tensor, Tensor],
    error: Tensor,
    codes: Tensor,
    start: int,
) -> None:
    """The sequential columns of one block; fills `error` and `codes` (without the zero) for its rows."""
    feedback = upper.T[start : start + len(target), start : start + len(target)].contiguous()
    for k in range(len(target)):
        j = start + k
        wanted = torch.addmv(target[k], error[start:j].T, feedback[k, :k]) if k else target[k]
        code = codes[j]
        torch.div(wanted, scale[j], out=code)
        code.round_()
        torch.clamp(code, ends[0][j], ends[1][j], out=code)
        torch.addcmul(columns[j], code, scale[j], value=-1, out=error[j])


def refine(weight: Tensor, codes: Tensor, hessian: Tensor, scales: Scales, grid: Grid, sweeps: int) -> Tensor:
    """Coordinate descent on the codes from a solution, `sweeps` times over all columns: codes uint8 [rows, n].

    Each column is set to the grid's best answer to the errors of all others, q_j = round(q_j + (E H)_j / H_jj), so
    tr(E H E') never grows. The column loop can only answer to columns before it. Source: Behdin et al., QuantEase
    (arXiv:2309.01885). `hessian` must have a positive diagonal (damped).
    """
    n = weight.shape[1]
    width = n // scales.scale.shape[1]
    scale = scales.scale.T.repeat_interleave(width, dim=0)  # (n, rows)
    zero = scales.zero.T.repeat_interleave(width, dim=0)
    low, high = -zero, grid.levels - 1 - zero
    level = codes.T.float().sub_(zero)
    gradient = hessian @ (weight.T - level * scale)  # (E H)', columns first
    inverse = 1 / hessian.diagonal()
    for _ in range(sweeps):
        for start in range(0, n, BLOCK):
            stop = min(start + BLOCK, n)
            moved = torch.empty_like(gradient[start:stop])  # change of E in this block
            inside = hessian[start:stop, start:stop].contiguous()
            for k in range(stop - start):
                j = start + k
                pull = torch.addmv(gradient[j], moved[:k].T, inside[k, :k]) if k else gradient[j]
                best = torch.addcdiv(level[j], pull, scale[j], value=float(inverse[j])).round_()
                best = torch.clamp(best, low[j], high[j])
                torch.mul(level[j] - best, scale[j], out=moved[k])
                level[j] = best
            gradient.addmm_(hessian[:, start:stop], moved)
    return level.add_(zero).to(torch.uint8).T.contiguous()


def add_drift(drift: Tensor, inputs: Tensor, exact: Tensor) -> None:
    """drift (fp32 [n, n]) += (exact - inputs)' @ inputs, both [..., n]."""
    x = inputs.reshape(-1, inputs.shape[-1]).float()
    drift.addmm_((exact.reshape(x.shape).float() - x).T, x)


def correct(weight: Tensor, hessian: Tensor, drift: Tensor, damp: float, share: float) -> Tensor:
    """The weight whose output on the inputs as they are comes closest to the original's on the inputs as they were.

    weight: fp32 [rows, n]. hessian: X' X of the inputs X after earlier layers were quantized. drift: (X0 - X)' X, X0 the
    inputs before. Returns W + share * W drift (H + damp * mean(diag) * I)^-1. Source: Arai & Ichikawa, QEP
    (arXiv:2504.09629), and Li et al., GPTAQ (arXiv:2504.02692).
    """
    if not share or not drift.any():
        return weight
    damped = hessian.clone()
    damped.diagonal().add_(damp * hessian.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info):
        return weight
    return weight + share * torch.cholesky_solve((weight @ drift).T, factor).T


def output_error(error: Tensor, hessian: Tensor) -> float:
    """tr(E H E'), fp32 [rows, n] against the undamped, symmetric H [n, n]."""
    return float(torch.einsum("rn,rn->", error @ hessian, error))


@dataclass(frozen=True)
class Solution:
    """One weight's result. loss = tr(E H E'), relative = sqrt(loss / tr(W H W')), both against the undamped Hessian."""

    codes: Tensor
    scales: Scales
    grid: Grid
    loss: float
    relative: float
    rtn_relative: float
    damp: float
    order: Order
    fallback: bool

    def weight(self) -> Tensor:
        """fp32 [rows, n], exactly what a server dequantizes."""
        return dequantize_codes(self.codes, self.scales)


def quantize_weight(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    order: Order,
    damp: float,
    sweeps: int = 0,
    factors: dict[tuple[str, int], Factor] | None = None,
) -> Solution:
    """Quantize one weight (fp32 [rows, n]) against a symmetric Hessian (fp32 [n, n]).

    Weights that share their input share `factors`, keyed by order and group size: pass the same dict for each.
    `fallback` says that rounding to nearest on the same scales lost less, or that no factor was found.
    """
    diagonal = hessian.diagonal()
    factors = {} if factors is None else factors
    key = (order, grid.group_size)
    if key not in factors:
        factors[key] = factorize(hessian, column_order(diagonal, order, grid.group_size), damp)
    factor = factors[key]
    mean = float(diagonal.mean())
    scales = find_scales(weight, diagonal + (factor.damp * mean if mean > 0 else 1.0), grid)
    codes, worse = solve(weight, factor, scales, grid), False
    if sweeps and mean > 0:
        damped = hessian + torch.eye(len(hessian), device=hessian.device) * (factor.damp * mean)
        codes = refine(weight, codes, damped, scales, grid, sweeps)
    loss = output_error(weight - dequantize_codes(codes, scales), hessian)
    control = _rtn_loss(weight, hessian, grid)
    if loss > control:  # else rounding on better scales cannot be worth a look
        rounded = round_to_grid(weight, scales, grid)
        rounded_loss = output_error(weight - dequantize_codes(rounded, scales), hessian)
        if rounded_loss < loss:
            codes, loss, worse = rounded, rounded_loss, True
    whole = max(output_error(weight, hessian), torch.finfo(torch.float32).tiny)
    relative, plain = ((max(x, 0.0) / whole) ** 0.5 for x in (loss, control))
    return Solution(codes, scales, grid, loss, relative, plain, factor.damp, order, factor.diagonal or worse)


def _rtn_loss(weight: Tensor, hessian: Tensor, grid: Grid) -> float:
    """The control: min-max scales, round to nearest."""
    plain = replace(grid, search="minmax", signed=False)
    scales = find_scales(weight, hessian.diagonal(), plain)
    return output_error(weight - dequantize_codes(round_to_grid(weight, scales, plain), scales), hessian)


def better_order(
    weights: Sequence[Tensor], train: Tensor, held: Tensor, grid: Grid, orders: Sequence[Order], damp: float
) -> Order:
    """The order whose solutions on the Hessian `train` lose least on the Hessian `held` of other text.

    weights: fp32 [rows, n] of linears that share their input. Activation and group-aware order trade places from
    module to module; their codes look alike to a server.
    """
    importance = train.diagonal() + damp * train.diagonal().mean()
    scales = [find_scales(w, importance, grid) for w in weights]

    def held_loss(order: Order) -> float:
        factor = factorize(train, column_order(train.diagonal(), order, grid.group_size), damp)
        codes = [solve(w, factor, s, grid) for w, s in zip(weights, scales, strict=True)]
        return sum(
            output_error(w - dequantize_codes(c, s), held) for w, c, s in zip(weights, codes, scales, strict=True)
        )

    return min(orders, key=held_loss)
