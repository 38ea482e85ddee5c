"""Second moments of a linear's inputs, X' X, and the drift of the inputs.

On the CPU everything is fp32. On a GPU 16-bit inputs are multiplied as they are and summed in fp32: products of two
bf16 or fp16 numbers are exact there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from requant.runtime.device import profile_of

MIRRORED = 2048  # columns of the upper triangle copied at a time


def add_to_hessian(hessian: Tensor, inputs: Tensor) -> None:
    """hessian (fp32 [n, n], upper triangle only) += inputs' @ inputs, inputs [..., n].

    Panels below the diagonal are skipped.
    """
    x = _rows(inputs)
    panel = profile_of(x.device).hessian_panel
    for start in range(0, x.shape[1], panel):
        _add_product(hessian[start : start + panel, start:], x[:, start : start + panel], x[:, start:])


def add_drift(drift: Tensor, inputs: Tensor, unquantized: Tensor) -> None:
    """drift (fp32 [n, n]) += (unquantized - inputs)' @ inputs, both [..., n]."""
    x, original = _rows(inputs), _rows(unquantized)
    _add_product(drift, original - x, x)


def symmetrize(hessian: Tensor) -> Tensor:
    """Mirror the upper triangle into the lower one, in place."""
    n = hessian.shape[0]
    for start in range(0, n, MIRRORED):
        stop = min(start + MIRRORED, n)
        corner = hessian[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
        hessian[stop:, start:stop] = hessian[start:stop, stop:].T
    return hessian


def _rows(inputs: Tensor) -> Tensor:
    """[..., n] -> [tokens, n], in fp32 where the device has no 16-bit product with an fp32 sum."""
    x = inputs.reshape(-1, inputs.shape[-1])
    return x if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) else x.float()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total (fp32) += left' @ right."""
    if left.dtype == torch.float32:
        total.addmm_(left.T, right)
    else:
        torch.addmm(total, left.T, right, out_dtype=torch.float32, out=total)


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of the inputs of a group of linears.

    The Hessian X'X / tokens, the drift (X0 - X)'X / tokens, the Hessians of two parts.
    """

    hessian: Tensor
    drift: Tensor | None
    halves: tuple[Tensor, Tensor] | None
    tokens: int  # of these inputs: an expert sees a part of the text


Pool = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[int]], list[int]]
"""Add the sums of other ranks in place: of upper triangles, of whole matrices, of counts (returned)."""


def gather(
    inputs: Iterable[tuple[Tensor, Tensor | None]],
    n: int,
    device: torch.device,
    *,
    drifting: bool = False,
    first_held_out: int | None = None,
    pool: Pool = lambda _triangles, _others, counts: list(counts),
) -> Moments:
    """Sum up batches of (input, unquantized input), each [..., n].

    drifting: also the drift, of the batches that have an unquantized input. first_held_out: the first batch of the
    second of two parts; None: one Hessian of all batches. pool: adds the sums of other ranks.
    """
    total = torch.zeros(n, n, device=device)
    held = total if first_held_out is None else torch.zeros_like(total)
    drift = torch.zeros_like(total) if drifting else None
    compared = tokens = 0
    for i, (x, unquantized) in enumerate(inputs):
        tokens += x.shape[:-1].numel()
        add_to_hessian(total if first_held_out is None or i < first_held_out else held, x)
        if unquantized is not None and drift is not None:
            add_drift(drift, x, unquantized)
            compared += x.shape[:-1].numel()
    sums = [total] if first_held_out is None else [total, held]
    tokens, compared = pool(sums, [] if drift is None else [drift], (tokens, compared))
    halves = None
    if first_held_out is not None:
        halves = (symmetrize(total.clone()), symmetrize(held))
        total.add_(held)
    hessian = symmetrize(total).div_(max(tokens, 1))
    return Moments(hessian, drift.div_(max(compared, 1)) if drift is not None else None, halves, tokens)
