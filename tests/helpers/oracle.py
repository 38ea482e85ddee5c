"""Slow second implementations of the product's maths: fp64, loops, no shared code.

Only tests import this.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def decode_4bit(data: bytes, absmax: list[float], values: list[float], blocksize: int, numel: int) -> Tensor:
    """Decode one element at a time: high nibble first, one fp32 product. Returns fp32 [numel]."""
    out = torch.empty(numel)
    for e in range(numel):
        byte = data[e // 2]
        code = byte >> 4 if e % 2 == 0 else byte & 15
        out[e] = torch.tensor(values[code]) * torch.tensor(absmax[e // blocksize])
    return out


def distance_to_nearest(values: Tensor, levels: Tensor) -> Tensor:
    """fp64 distance of each value to the nearest of `levels`, by looking at all of them."""
    return (values.double()[:, None] - levels.double()[None]).abs().amin(dim=1)


def from_classic_gptq(
    codes: Tensor, weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, bits: int, order: Tensor, damp: float
) -> float:
    """Largest distance of a code from what published GPTQ rounds there, in steps.

    0.5 where each code is the nearest.

    arXiv:2210.17323, algorithm 1, fp64: the Cholesky factor of the inverse Hessian, one column after another, each error
    spread at once over all later columns. It is the error of the code that is given, so a value halfway between two
    levels may go either way and all after it are held to what follows from that. scale, zero: [rows, groups].
    """
    w = weight.double()[:, order].clone()
    h = hessian.double()[order][:, order].clone()
    h += damp * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    width, worst = weight.shape[1] // scale.shape[1], 0.0
    for j, column in enumerate(order.tolist()):
        s, z = scale[:, column // width].double(), zero[:, column // width].double()
        q = codes[:, column].double()
        worst = max(worst, float((torch.clamp(w[:, j] / s + z, 0, 2**bits - 1) - q).abs().max()))
        error = (w[:, j] - s * (q - z)) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:][None]
    return worst


def from_descent(
    after: Tensor, before: Tensor, weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, levels: int
) -> float:
    """Largest distance of a code from its best value given all others, in steps.

    0.5 where each code is the nearest.

    One sweep of coordinate descent from codes `before` to `after`, in fp64, each code judged beside those that the sweep
    had set by then. scale, zero: [rows, groups].
    """
    w, h, worst = weight.double(), hessian.double(), 0.0
    width = weight.shape[1] // scale.shape[1]
    error = w - codes_to_weight(before, scale, zero)
    for j in range(w.shape[1]):
        s, z = scale[:, j // width].double(), zero[:, j // width].double()
        best = before[:, j].double() + error @ h[j] / h[j, j] / s
        q = after[:, j].double()
        worst = max(worst, float((torch.clamp(best, 0, levels - 1) - q).abs().max()))
        error[:, j] = w[:, j] - s * (q - z)
    return worst


def codes_to_weight(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """fp64 scale * (code - zero), one column at a time."""
    width = codes.shape[1] // scale.shape[1]
    columns = [
        (codes[:, j].double() - zero[:, j // width].double()) * scale[:, j // width].double()
        for j in range(codes.shape[1])
    ]
    return torch.stack(columns, dim=1)


def hessian_loss(error: Tensor, hessian: Tensor) -> float:
    """tr(E H E') in fp64, row by row."""
    h = hessian.double()
    return math.fsum(float(row @ h @ row) for row in error.double())


def pack_column(codes: list[int], bits: int) -> list[int]:
    """Codes as one long little-endian number, cut into signed 32-bit words."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(len(codes) * bits // 32)]
    return [w - 2**32 if w >= 2**31 else w for w in words]


def fold(weight: Tensor, a: Tensor, b: Tensor, scaling: float, magnitude: Tensor | None = None) -> Tensor:
    """LoRA and DoRA of one linear weight [out, in], fp64.

    arXiv:2106.09685; arXiv:2402.09353, eq. 5.
    """
    out = weight.double() + scaling * (b.double() @ a.double())
    if magnitude is None:
        return out
    norms = torch.sqrt((out * out).sum(dim=1))
    return out * (magnitude.double().reshape(-1) / norms)[:, None]


def coordinate_descent(
    weight: Tensor, codes: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, levels: int, sweeps: int
) -> tuple[Tensor, float]:
    """Set one code after another to its best value given all others, trying every level.

    In fp64, [rows, n] each.

    Also gives by how little a level was ever the best: what the next one loses more, as a share of what one step loses.
    """
    w, h, out, closest = weight.double(), hessian.double(), codes.clone().long(), math.inf
    for _ in range(sweeps):
        for j in range(w.shape[1]):
            for r in range(w.shape[0]):
                losses = []
                for level in range(levels):
                    trial = out[r].clone()
                    trial[j] = level
                    e = w[r] - (trial - zero[r]) * scale[r]
                    losses.append(float(e @ h @ e))
                out[r, j] = min(range(levels), key=losses.__getitem__)
                first, second = sorted(losses)[:2]
                closest = min(closest, (second - first) / float(h[j, j] * scale[r, j] ** 2))
    return out.to(torch.uint8), closest
