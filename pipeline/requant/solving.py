"""One stage of a block, the linears that share an input: solved together, their rows dealt out to all ranks.

Given the Hessian, rows do not depend on each other: each rank solves its own, and every rank gets the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from requant import gptq, kernels
from requant.correction import Correction
from requant.errors import StageError
from requant.factor import Factoring, NotFinite
from requant.grid import Grid, Scales
from requant.hessian import Moments
from requant.layout import Settings
from requant.ranks import Ranks


@dataclass(frozen=True, slots=True)
class Solved:
    """One linear's codes, and the weight that they were solved for (fp32 [rows, n]; None unless asked for)."""

    name: str
    solution: gptq.Solution
    wanted: Tensor | None
    hessian: Tensor


def solve_stage(
    linears: Mapping[str, Any], grids: Mapping[str, Grid], moments: Moments, settings: Settings, ranks: Ranks,
    *, wanted: bool = False,
) -> Iterator[Solved]:  # fmt: skip
    """Quantize the weights of `linears` against the moments of their input, which are used up. wanted: whether to keep those.

    Products in fp32 run on a GPU's tensor cores, until the last is yielded for the caller too: what it measures of a solution
    needs no more than 10 bits. What needs no factor is done beside the factorization.
    Raises StageError when the moments are not finite.
    """
    like: dict[Grid, list[str]] = {}
    for name in linears:
        like.setdefault(grids[name], []).append(name)
    hessian, drift = moments.hessian, moments.drift
    try:
        with kernels.tensor_cores():
            own = {g: ranks.rows(torch.cat([linears[n].weight for n in names])).float() for g, names in like.items()}
            damp = _damp(settings, moments.tokens, len(hessian))
            order = _order(settings, list(own.values()), moments, next(iter(like)), damp, ranks)
            del moments  # the halves are as large as the Hessian
            begun = _begin(hessian, like, order, damp, ranks)
        total = drift.take()  # runs models: in what precision they do
        with kernels.tensor_cores():
            correction = Correction(total, list(own.values()), ranks)
            del total  # as large too, where it is used up
            factors = {key: begun.pop(key).result() for key in list(begun)}
            for position, (grid, names) in enumerate(like.items()):
                factor = factors[_kind(order, grid)]
                weight = correction.moved(position, own.pop(grid), factor, settings.correct)
                part = gptq.quantize_weight(weight, hessian, factor, grid, order=order, sweeps=settings.sweeps)
                sizes = [linears[n].out_features for n in names]
                solutions = gather(part, sum(sizes), ranks).split(sizes)
                weights = torch.split(ranks.gather(weight, sum(sizes)), sizes) if wanted else [None] * len(names)
                del weight
                yield from (Solved(n, s, w, hessian) for n, s, w in zip(names, solutions, weights, strict=True))
    except NotFinite:
        raise StageError(f"{next(iter(linears))}: its calibration inputs hold NaN or infinity") from None


def _begin(
    hessian: Tensor, grids: Iterable[Grid], order: gptq.Order, damp: float, ranks: Ranks
) -> dict[tuple[str, int], Factoring]:
    """The factorizations that weights on these grids need, under way."""
    begun: dict[tuple[str, int], Factoring] = {}
    for grid in grids:
        key = _kind(order, grid)
        if key not in begun:
            columns = gptq.column_order(hessian.diagonal(), order, grid.group_size)
            begun[key] = Factoring(hessian, columns, damp, ranks.cholesky)
    return begun


def _kind(order: gptq.Order, grid: Grid) -> tuple[str, int]:
    """What the order of columns depends on."""
    return order, grid.group_size if order == "group" else 0


def gather(part: gptq.Solution, rows: int, ranks: Ranks) -> gptq.Solution:
    """The solution of all `rows` rows, on every rank, out of what each has solved."""
    groups = part.scales.scale.shape[1]
    numbers = torch.cat([part.scales.scale, part.scales.zero, part.errors.T, part.rounded[:, None].float()], dim=1)
    whole = torch.split(ranks.gather(numbers, rows), [groups, groups, len(part.errors), 1], dim=1)
    scale, zero, errors, rounded = whole
    return replace(
        part, codes=ranks.gather(part.codes, rows), scales=Scales(scale.contiguous(), zero.contiguous()),
        errors=errors.T, rounded=rounded[:, 0] > 0,
    )  # fmt: skip


def _damp(settings: Settings, tokens: int, n: int) -> float:
    """The recipe's damping, or 0.02 with at least 16 tokens for each of `n` inputs, else 0.05."""
    if settings.damp is not None:
        return settings.damp
    return 0.02 if tokens >= 16 * n else 0.05


def _order(
    settings: Settings, weights: Sequence[Tensor], moments: Moments, grid: Grid, damp: float, ranks: Ranks
) -> gptq.Order:
    """The recipe's order; `auto` lets held-out batches decide, unless sweeps follow."""
    if settings.order != "auto":
        return settings.order
    if moments.halves is None:
        return "activation"
    return gptq.better_order(
        weights, *moments.halves, grid, ("activation", "group"), damp, total=lambda loss: ranks.total([loss])[0]
    )
