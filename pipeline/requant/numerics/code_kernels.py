"""Triton kernels from packed codes to a weight, and from its gradient to theirs.

Each reads a weight once. Their torch reference functions are in `requant.heal.codes`. The numbers are the same, but for
the order of the sums over a group, whose terms are not rounded to 16 bit here. Groups may have any number of codes.
packed: for up to 4 bits uint8 [out, in/2], columns j and j + in/2 in the low and high half of byte j; for 8 bits uint8
[out, in]. scale, zero: [out, groups]. All are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU comes without it
    triton = None

TILE = 2048  # codes that a program holds
WIDEST = 1024  # codes of a row among them
PAIRS = 1024  # bytes of codes that a program packs


def rebuild(packed: Tensor, scale: Tensor, zero: Tensor, columns: int) -> Tensor:
    """scale * (code - zero), [out, in] in the dtype of `scale`, one rounding."""
    weight = torch.empty(len(packed), columns, dtype=scale.dtype, device=packed.device)
    add_gradients(weight, packed, scale, zero)  # without latent and offset nothing is read of it
    return weight


def add_gradients(
    gradient: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    latent: Tensor | None = None,
    offset: Tensor | None = None,
    unit: Tensor | None = None,
) -> None:
    """Add what a weight's gradient [out, in] gives to those of its codes and scales; it becomes the weight.

    latent: fp32 [out, in], to which gradient * scale is added. offset: fp32 [out, groups], to which the sum over a
    group of gradient * (code - zero), times `unit` (fp32 [out, groups]), is added. gradient: in the dtype of `scale`,
    overwritten by scale * (code - zero).
    """
    (rows, columns), groups = gradient.shape, scale.shape[1]
    width = columns // groups
    block = min(WIDEST, triton.next_power_of_2(width))
    at_once = TILE // block
    _by_group[(triton.cdiv(rows, at_once) * groups,)](
        gradient, packed, scale, zero, latent, offset, unit, rows, columns, groups, width,
        HALVES=packed.shape[1] != columns, LATENT=latent is not None, OFFSET=offset is not None,
        ROWS=at_once, WIDTH=block, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def round_latent(latent: Tensor, packed: Tensor, low: float, high: float) -> None:
    """Keep a latent fp32 [out, in] from low to high, in place, and pack it rounded.

    Halves go to even.
    """
    rows, count = packed.shape
    _round_latent[(triton.cdiv(rows * count, PAIRS),)](
        latent, packed, rows * count, count, low, high, HALVES=count != latent.shape[1], PAIRS=PAIRS, num_warps=4,
    )  # fmt: skip


if triton is not None:

    @triton.jit(do_not_specialize=["groups"])
    def _by_group(
        values_ptr, packed_ptr, scale_ptr, zero_ptr, latent_ptr, offset_ptr, unit_ptr, rows, columns, groups, width,
        HALVES: tl.constexpr, LATENT: tl.constexpr, OFFSET: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One group of ROWS rows: nothing is summed across programs."""
        group, block = tl.program_id(0) % groups, tl.program_id(0) // groups
        row = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        there, own, half = row < rows, row * groups + group, columns // 2
        scale = tl.load(scale_ptr + own, mask=there, other=1.0).to(tl.float32)[:, None]
        zero = tl.load(zero_ptr + own, mask=there, other=0).to(tl.int32)[:, None]
        total = tl.zeros([ROWS], tl.float32)
        for begin in range(0, width, WIDTH):
            inside = begin + tl.arange(0, WIDTH)
            j = group * width + inside
            real = there[:, None] & (inside < width)[None, :]
            at = row[:, None] * columns + j[None, :]
            if HALVES:
                upper = j >= half
                byte = tl.load(packed_ptr + row[:, None] * half + tl.where(upper, j - half, j)[None, :], mask=real)
                code = tl.where(upper[None, :], byte.to(tl.int32) >> 4, byte.to(tl.int32) & 15)
            else:
                code = tl.load(packed_ptr + at, mask=real).to(tl.int32)
            centred = (code - zero).to(tl.float32)
            if LATENT or OFFSET:
                gradient = tl.load(values_ptr + at, mask=real, other=0.0).to(tl.float32)
            if LATENT:
                before = tl.load(latent_ptr + at, mask=real, other=0.0)
                tl.store(latent_ptr + at, before + gradient * scale, mask=real)
            if OFFSET:
                total += tl.sum(gradient * centred, axis=1)
            tl.store(values_ptr + at, (centred * scale).to(values_ptr.dtype.element_ty), mask=real)
        if OFFSET:
            unit = tl.load(unit_ptr + own, mask=there, other=0.0)
            known = tl.load(offset_ptr + own, mask=there, other=0.0)
            tl.store(offset_ptr + own, known + total * unit, mask=there)

    @triton.jit
    def _held(latent_ptr, at, real, low, high):
        """The latent kept in its range; written back only where it was outside."""
        found = tl.load(latent_ptr + at, mask=real, other=0.0)
        kept = tl.where(found < low, low, tl.where(found > high, high, found))
        tl.store(latent_ptr + at, kept, mask=real & (kept != found))
        return ((kept + 12582912.0) - 12582912.0).to(tl.int32)

    @triton.jit(do_not_specialize=["low", "high"])
    def _round_latent(
        latent_ptr, packed_ptr, total, count, low, high, HALVES: tl.constexpr, PAIRS: tl.constexpr
    ):  # fmt: skip
        """count: bytes of a row."""
        begin = tl.program_id(0).to(tl.int64) * PAIRS
        first = begin // count
        inside = (begin - first * count).to(tl.int32) + tl.arange(0, PAIRS)
        real = begin + tl.arange(0, PAIRS) < total
        row, j = first + inside // count, inside % count
        if HALVES:
            low_half = _held(latent_ptr, row * (2 * count) + j, real, low, high)
            byte = low_half | (_held(latent_ptr, row * (2 * count) + count + j, real, low, high) << 4)
        else:
            byte = _held(latent_ptr, row * count + j, real, low, high)
        tl.store(packed_ptr + begin + tl.arange(0, PAIRS), byte.to(tl.uint8), mask=real)
