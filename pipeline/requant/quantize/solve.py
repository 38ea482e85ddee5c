"""Solves the linears of one group together, with their rows distributed over all ranks.

Given the Hessian, rows do not depend on each other: each rank solves its own, and every rank gets the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from requant.errors import NotFiniteError
from requant.numerics import gptq, matmul_precision
from requant.numerics.cholesky import shared_cholesky
from requant.numerics.grid import Grid, Scales
from requant.numerics.hessian import Moments
from requant.numerics.solution import Order, Solution
from requant.quantize.error_correction import Correction
from requant.quantize.plan import Settings
from requant.runtime.ranks import Ranks

SPLIT_FROM = 8192  # rows of a matrix that ranks factor together: below, the exchange takes longer


@dataclass(frozen=True, kw_only=True, slots=True)
class Solved:
    """One linear's codes, and the weight they were solved for (fp32 [rows, n], if requested)."""

    name: str
    solution: Solution
    weight: Tensor | None
    hessian: Tensor


def solve_group(
    linears: Mapping[str, Any],
    grids: Mapping[str, Grid],
    moments: Moments,
    settings: Settings,
    ranks: Ranks,
    *,
    keep_weights: bool = False,
) -> Iterator[Solved]:
    """Quantize the weights of `linears` against the moments of their input.

    moments: overwritten. keep_weights: whether to keep the weights that codes were solved for.
    Until the last linear is yielded fp32 products run on a GPU's tensor cores, for the caller too: its measurements of
    a solution need no more than 10 bits.
    Raises NotFiniteError when the moments are not finite.
    """
    like: dict[Grid, list[str]] = {}
    for name in linears:
        like.setdefault(grids[name], []).append(name)
    with matmul_precision.tensor_cores():
        own = {g: ranks.own_rows(torch.cat([linears[n].weight for n in names])).float() for g, names in like.items()}
        damp = gptq.damping(settings.damp, moments.tokens, len(moments.hessian))
        with _named(next(iter(linears))):
            order = _order(settings, list(own.values()), moments, next(iter(like)), damp, ranks)
        correction = Correction(moments.drift, list(own.values()), ranks)
        hessian = moments.hessian
        del moments  # the halves, and the drift where it is used up, are as large as the Hessian
        factors: dict[tuple[str, int], gptq.Factor] = {}
        for position, (grid, names) in enumerate(like.items()):
            key = (order, grid.group_size if order == "group" else 0)
            if key not in factors:
                columns = gptq.column_order(hessian.diagonal(), order, grid.group_size)
                with _named(names[0]):
                    factors[key] = gptq.factorize(hessian, columns, damp, partial(cholesky_of, ranks=ranks))
            weight = correction.corrected(position, own.pop(grid), factors[key], settings.correct)
            part = gptq.quantize_weight(weight, hessian, factors[key], grid, order=order, sweeps=settings.sweeps)
            sizes = [linears[n].out_features for n in names]
            solutions = gather(part, sum(sizes), ranks).split(sizes)
            weights = (
                torch.split(ranks.all_gather_rows(weight, sum(sizes)), sizes) if keep_weights else [None] * len(names)
            )
            del weight
            yield from (
                Solved(name=n, solution=s, weight=w, hessian=hessian)
                for n, s, w in zip(names, solutions, weights, strict=True)
            )


def cholesky_of(matrix: Tensor, *, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Factor fp32 [n, n] of all ranks as `torch.linalg.cholesky_ex`; may overwrite `matrix`."""
    if ranks.count > 1 and len(matrix) >= SPLIT_FROM:
        return shared_cholesky(matrix, ranks.rank, ranks.count, ranks.broadcast_async)
    lower, info = torch.linalg.cholesky_ex(matrix)
    return lower, info


def gather(part: Solution, rows: int, ranks: Ranks) -> Solution:
    """The solution of all `rows` rows, on every rank, gathered from the ranks' parts."""
    groups = part.scales.scale.shape[1]
    numbers = torch.cat([part.scales.scale, part.scales.zero, part.errors.T, part.rounded[:, None].float()], dim=1)
    whole = torch.split(ranks.all_gather_rows(numbers, rows), [groups, groups, len(part.errors), 1], dim=1)
    scale, zero, errors, rounded = whole
    return replace(
        part,
        codes=ranks.all_gather_rows(part.codes, rows),
        scales=Scales(scale.contiguous(), zero.contiguous()),
        errors=errors.T,
        rounded=rounded[:, 0] > 0,
    )


@contextmanager
def _named(linear: str) -> Iterator[None]:
    """Context that names the linear whose Hessian is not finite.

    The factorization checks the Hessian itself; a check before it would add a synchronization.
    """
    try:
        yield
    except FloatingPointError as error:
        raise NotFiniteError(f"{linear}: its calibration inputs hold NaN or infinity") from error


def _order(
    settings: Settings, weights: Sequence[Tensor], moments: Moments, grid: Grid, damp: float, ranks: Ranks
) -> Order:
    """The recipe's order; `auto` lets held-out batches decide, unless sweeps follow."""
    if settings.order != "auto":
        return settings.order
    if moments.halves is None:
        return "activation"
    return gptq.better_order(
        weights, *moments.halves, grid, ("activation", "group"), damp, total=lambda loss: ranks.sum([loss])[0]
    )
