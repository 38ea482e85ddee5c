"""The quantizer's inner loops as Triton kernels, each the twin of a plain torch function: same numbers but for ties.

Without Triton (any CPU, and builds of torch that lack it) nothing here runs and the twins do the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU comes without it
    triton = None

ROWS = 16  # rows of a weight for each program: a block of 128 columns then fits the registers of one warp
GROUPS = 16


def usable(tensor: Tensor) -> bool:
    """Whether the kernels run where `tensor` is."""
    return triton is not None and tensor.is_cuda


def tensor_cores() -> AbstractContextManager[None]:
    """Products of fp32 matrices run on a GPU's tensor cores inside: TF32, 10 bits of mantissa, sums in fp32."""
    return _products("high")


def full_precision() -> AbstractContextManager[None]:
    """fp32 products in fp32 inside, whatever the process allows elsewhere."""
    return _products("highest")


@contextmanager
def _products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True, slots=True)
class Block:
    """Some columns of a weight while their codes are chosen, columns first.

    scale, zero: fp32 [k, rows]. error: fp32 [k, rows], W - Q. codes: uint8 [k, rows]. Both are written in place.
    """

    scale: Tensor
    zero: Tensor
    levels: int
    error: Tensor
    codes: Tensor


def round_columns(target: Tensor, feedback: Tensor, block: Block) -> None:
    """Round the columns of one block, last first. target: fp32 [k, rows]. feedback: [k, k], strictly lower.

    block.error holds the weight's columns and takes their errors.
    """
    count, rows = target.shape
    _round_columns[(triton.cdiv(rows, ROWS),)](
        target, feedback.contiguous(), block.scale, block.zero, block.error, block.codes,
        rows, block.levels, COUNT=count, K=triton.next_power_of_2(count), ROWS=ROWS, num_warps=1,
    )  # fmt: skip


def sweep_columns(pull: Tensor, inside: Tensor, block: Block) -> None:
    """Set each column of one block to its best code, first to last. pull: fp32 [k, rows]. inside: [k, k] of the Hessian."""
    count, rows = pull.shape
    _sweep_columns[(triton.cdiv(rows, ROWS),)](
        pull, inside, (1 / inside.diagonal()).contiguous(), block.scale, block.zero, block.error, block.codes,
        rows, block.levels, COUNT=count, K=triton.next_power_of_2(count), ROWS=ROWS, num_warps=1,
    )  # fmt: skip


def search(weight: Tensor, importance: Tensor, shrinks: Tensor, fine: Tensor, symmetric: bool, levels: int) -> Tensor:
    """The best shrink of each group's range: weight fp32 [rows, groups, g], importance [groups, g] -> fp32 [rows, groups].

    Tries `shrinks`, then the best of them plus each of `fine`; the earlier wins a tie.
    """
    rows, groups, width = weight.shape
    best = torch.empty(rows * groups, dtype=torch.float32, device=weight.device)
    _search[(triton.cdiv(rows * groups, _groups_a_program(width)),)](
        weight.contiguous(), importance.contiguous(), shrinks, fine, best, rows * groups, groups, width, levels,
        COARSE=len(shrinks), FINE=len(fine), SYMMETRIC=symmetric, WIDTH=triton.next_power_of_2(width),
        GROUPS=_groups_a_program(width),
        num_warps=4,
    )  # fmt: skip
    return best.reshape(rows, groups)


def _groups_a_program(width: int) -> int:
    return max(1, min(GROUPS, 4096 // width))


if triton is not None:

    @triton.jit
    def _nearest(x):
        """The nearest whole number, halves to even, of |x| < 2^22; larger numbers stay too large to matter after a clamp."""
        return (x + 12582912.0) - 12582912.0

    @triton.jit
    def _to_bf16(x):
        """fp32 rounded to bf16's precision, halves to even, whatever the cast of the backend does."""
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)

    @triton.jit
    def _round_columns(
        target_ptr, feedback_ptr, scale_ptr, zero_ptr, error_ptr, codes_ptr, rows, levels,
        COUNT: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        real = row < rows
        k = tl.arange(0, K)
        at = k[:, None] * rows.to(tl.int64) + row[None, :]
        tile = tl.load(target_ptr + at, mask=real[None, :] & (k < COUNT)[:, None], other=0.0)
        last = (COUNT - 1) * rows.to(tl.int64) + row
        scale = tl.load(scale_ptr + last, mask=real, other=1.0)
        zero = tl.load(zero_ptr + last, mask=real, other=0.0)
        weight = tl.load(error_ptr + last, mask=real, other=0.0)
        for step in range(COUNT):
            j = COUNT - 1 - step
            here = j * rows.to(tl.int64) + row
            before = tl.maximum(j - 1, 0) * rows.to(tl.int64) + row  # the next column's numbers travel meanwhile
            scale_next = tl.load(scale_ptr + before, mask=real, other=1.0)
            zero_next = tl.load(zero_ptr + before, mask=real, other=0.0)
            weight_next = tl.load(error_ptr + before, mask=real, other=0.0)
            backwards = tl.load(feedback_ptr + j * COUNT + k, mask=k < COUNT, other=0.0)
            wanted = tl.sum(tl.where((k == j)[:, None], tile, 0.0), axis=0)
            code = _nearest(tl.div_rn(wanted, scale))
            code = tl.minimum(tl.maximum(code, -zero), levels - 1 - zero)
            error = weight - code * scale
            tl.store(error_ptr + here, error, mask=real)
            tl.store(codes_ptr + here, (code + zero).to(tl.uint8), mask=real)
            tile += backwards[:, None] * error[None, :]
            scale, zero, weight = scale_next, zero_next, weight_next

    @triton.jit
    def _sweep_columns(
        pull_ptr, inside_ptr, inverse_ptr, scale_ptr, zero_ptr, error_ptr, codes_ptr, rows, levels,
        COUNT: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        real = row < rows
        k = tl.arange(0, K)
        at = k[:, None] * rows.to(tl.int64) + row[None, :]
        tile = tl.load(pull_ptr + at, mask=real[None, :] & (k < COUNT)[:, None], other=0.0)
        scale = tl.load(scale_ptr + row, mask=real, other=1.0)
        zero = tl.load(zero_ptr + row, mask=real, other=0.0)
        code = tl.load(codes_ptr + row, mask=real, other=0)
        error = tl.load(error_ptr + row, mask=real, other=0.0)
        for j in range(COUNT):
            here = j * rows.to(tl.int64) + row
            after = tl.minimum(j + 1, COUNT - 1) * rows.to(tl.int64) + row
            scale_next = tl.load(scale_ptr + after, mask=real, other=1.0)
            zero_next = tl.load(zero_ptr + after, mask=real, other=0.0)
            code_next = tl.load(codes_ptr + after, mask=real, other=0)
            error_next = tl.load(error_ptr + after, mask=real, other=0.0)
            column = tl.load(inside_ptr + j * COUNT + k, mask=k < COUNT, other=0.0)
            inverse = tl.load(inverse_ptr + j)
            wanted = tl.sum(tl.where((k == j)[:, None], tile, 0.0), axis=0)
            level = code.to(tl.float32) - zero
            best = _nearest(level + tl.div_rn(wanted * inverse, scale))
            best = tl.minimum(tl.maximum(best, -zero), levels - 1 - zero)
            moved = (level - best) * scale
            tl.store(error_ptr + here, error + moved, mask=real)
            tl.store(codes_ptr + here, (best + zero).to(tl.uint8), mask=real)
            tile += column[:, None] * moved[None, :]
            scale, zero, code, error = scale_next, zero_next, code_next, error_next

    @triton.jit
    def _loss(w, importance, low, high, shrink, levels, SYMMETRIC: tl.constexpr):
        """Weighted squared error of rounding w [groups, width] on the range shrunk by `shrink` [groups]."""
        if SYMMETRIC:
            half = levels // 2
            scale = tl.div_rn(tl.maximum(-low, high) * shrink, half.to(tl.float32))
            zero = tl.zeros_like(low) + half.to(tl.float32)
        else:
            scale = tl.div_rn((high - low) * tl.abs(shrink), (levels - 1).to(tl.float32))
        scale = _to_bf16(scale).to(tl.float16).to(tl.float32)
        smallest = 5.9604644775390625e-08
        scale = tl.where(scale == 0, tl.where(shrink < 0, -smallest, smallest), scale)
        if not SYMMETRIC:
            zero = _nearest(tl.div_rn(-low * tl.abs(shrink), scale))
            zero = tl.minimum(tl.maximum(zero, 1.0), levels - 1.0)
        s, z = scale[:, None], zero[:, None]
        code = _nearest(tl.div_rn(w, tl.broadcast_to(s, w.shape)))
        code = tl.minimum(tl.maximum(code, -z), levels - 1 - z)
        error = code * s - w
        return tl.sum(error * error * importance, axis=1)

    @triton.jit
    def _search(
        weight_ptr, importance_ptr, shrinks_ptr, fine_ptr, best_ptr, total, groups, width, levels,
        COARSE: tl.constexpr, FINE: tl.constexpr, SYMMETRIC: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr,
    ):  # fmt: skip
        group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
        j = tl.arange(0, WIDTH)
        real = (group < total)[:, None] & (j < width)[None, :]
        w = tl.load(weight_ptr + group[:, None] * width + j[None, :], mask=real, other=0.0)
        importance = tl.load(importance_ptr + (group % groups)[:, None] * width + j[None, :], mask=real, other=0.0)
        low, high = tl.minimum(tl.min(w, axis=1), 0.0), tl.maximum(tl.max(w, axis=1), 0.0)
        least = tl.full([GROUPS], float("inf"), tl.float32)
        best = tl.full([GROUPS], 1.0, tl.float32)
        for i in range(COARSE):
            shrink = tl.load(shrinks_ptr + i) + tl.zeros_like(low)
            loss = _loss(w, importance, low, high, shrink, levels, SYMMETRIC)
            best = tl.where(loss < least, shrink, best)
            least = tl.minimum(loss, least)
        centre = best
        for i in range(FINE):
            shrink = centre + tl.load(fine_ptr + i)
            loss = _loss(w, importance, low, high, shrink, levels, SYMMETRIC)
            best = tl.where(loss < least, shrink, best)
            least = tl.minimum(loss, least)
        tl.store(best_ptr + group, best, mask=group < total)
