"""Second moments of what a linear receives: X' X, and how far the inputs have drifted. Tensors in, tensors out.

On the CPU everything is fp32. On a GPU 16-bit inputs are multiplied as they are and summed in fp32: products of two
bf16 or fp16 numbers are exact there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_PANEL = {"cpu": 512}
_PANEL_ELSE = 2048


def add_to_hessian(hessian: Tensor, inputs: Tensor) -> None:
    """hessian (fp32 [n, n], upper triangle only) += inputs' @ inputs, inputs [..., n]. Panels below the diagonal are skipped."""
    x = _rows(inputs)
    panel = _PANEL.get(x.device.type, _PANEL_ELSE)
    for start in range(0, x.shape[1], panel):
        _add_product(hessian[start : start + panel, start:], x[:, start : start + panel], x[:, start:])


def add_drift(drift: Tensor, inputs: Tensor, exact: Tensor) -> None:
    """drift (fp32 [n, n]) += (exact - inputs)' @ inputs, both [..., n]."""
    x, was = _rows(inputs), _rows(exact)
    _add_product(drift, was - x, x)


def symmetrize(hessian: Tensor) -> Tensor:
    """Mirror the upper triangle into the lower one, in place."""
    n = hessian.shape[0]
    for start in range(0, n, _PANEL_ELSE):
        stop = min(start + _PANEL_ELSE, n)
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


Pool = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[int]], list[int]]
"""Adds to sums, in place, what others have summed up of other batches: upper triangles, whole matrices, counts (returned)."""
Exact = Tensor | Callable[[], Tensor] | None
"""What an input would be had nothing been quantized: known, still to be found (by calls in their order), or not wanted."""


@dataclass(frozen=True, slots=True)
class Moments:
    """What a stage's inputs say: the Hessian X'X / tokens, the drift (X0 - X)'X / tokens, the Hessians of two parts."""

    hessian: Tensor
    drift: Drift
    halves: tuple[Tensor, Tensor] | None
    tokens: int  # that the stage saw: an expert sees a part of the text


class Drift:
    """Sums up exact inputs where they are known, and those still to be found once the drift is asked for."""

    def __init__(self, n: int, device: torch.device, wanted: bool) -> None:
        self.n, self.device, self.wanted = n, device, wanted
        self.sum: Tensor | None = None
        self.left: list[tuple[Tensor, Callable[[], Tensor]]] = []
        self.tokens = 0
        self.pool: Pool = alone

    def add(self, inputs: Tensor, exact: Exact) -> None:
        """One batch's input and exact input, each [..., n]."""
        if exact is None or not self.wanted:
            return
        self.tokens += inputs.shape[:-1].numel()
        if isinstance(exact, Tensor):
            add_drift(self._total(), inputs, exact)
        else:
            self.left.append((inputs, exact))

    def take(self) -> Tensor | None:
        """fp32 [n, n], or None where it was not wanted; once, for it is not kept."""
        if not self.wanted:
            return None
        for inputs, exact in self.left:
            add_drift(self._total(), inputs, exact())
        self.left.clear()
        total, self.sum = self._total(), None
        self.pool([], [total], [])
        return total.div_(max(self.tokens, 1))

    def _total(self) -> Tensor:
        if self.sum is None:
            self.sum = torch.zeros(self.n, self.n, device=self.device)
        return self.sum


def alone(_triangles: Sequence[Tensor], _others: Sequence[Tensor], counts: Sequence[int]) -> list[int]:
    """The `Pool` of one who shares with nobody."""
    return list(counts)


def gather(
    inputs: Iterable[tuple[Tensor, Exact]], n: int, device: torch.device,
    *, drifting: bool = False, held_from: int | None = None, pool: Pool = alone,
) -> Moments:  # fmt: skip
    """Sum up batches of (input, exact input), each [..., n].

    drifting: whether the drift is wanted, from the batches that have an exact input. held_from: the first batch of the
    second of the two parts, None when one Hessian of everything will do. pool: what others have gathered.
    """
    total = torch.zeros(n, n, device=device)
    held = total if held_from is None else torch.zeros_like(total)
    drift, tokens = Drift(n, device, drifting), 0
    for i, (x, exact) in enumerate(inputs):
        tokens += x.shape[:-1].numel()
        add_to_hessian(total if held_from is None or i < held_from else held, x)
        drift.add(x, exact)
    sums = [total] if held_from is None else [total, held]
    tokens, drift.tokens = pool(sums, [], (tokens, drift.tokens))
    drift.pool = pool
    halves = None
    if held_from is not None:
        halves = (symmetrize(total.clone()), symmetrize(held))
        total.add_(held)
    return Moments(symmetrize(total).div_(max(tokens, 1)), drift, halves, tokens)
