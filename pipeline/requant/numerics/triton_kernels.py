"""Triton kernels of the quantizer's inner loops, each with a torch reference function.

Both give the same numbers except in ties. Without Triton (any CPU, and builds of torch that lack it) the reference
functions are used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch for the CPU comes without it
    triton = None

ROWS = 16  # rows of a weight for each program, one warp
PART = 16  # columns of a block that a program holds in registers
WIDE = 64  # earlier columns whose changes are applied in one product
GROUPS = 16


def usable(tensor: Tensor) -> bool:
    """Whether the kernels run where `tensor` is.

    On NVIDIA's GPUs, whose products in three parts of TF32 they use.
    """
    return triton is not None and tensor.is_cuda and torch.version.hip is None


def begin(device: torch.device) -> None:
    """Initialise Triton and the GPU's driver by a kernel that does nothing."""
    nothing = torch.empty(1, device=device)
    if usable(nothing):
        _nothing[(1,)](nothing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Some columns of a weight while their codes are chosen, columns first.

    scale, zero: fp32 [groups, rows]. group: int64 [k], of each column. error: fp32 [k, rows], W - Q, and codes: uint8
    [k, rows], are written in place. All are contiguous.
    """

    scale: Tensor
    zero: Tensor
    group: Tensor
    levels: int
    error: Tensor
    codes: Tensor


def round_columns(target: Tensor, feedback: Tensor, block: Block) -> None:
    """Round the columns of one block, last first.

    feedback: [k, k], below its diagonal L's; its rows are contiguous.

    target: fp32 [k, rows], contiguous, overwritten. block.error: the weight's columns, replaced by their errors.
    """
    count, rows = target.shape
    _round_columns[(triton.cdiv(rows, ROWS),)](
        target, feedback, block.scale, block.zero, block.group, block.error, block.codes,
        rows, feedback.stride(0), block.levels, COUNT=count, PART=PART, WIDE=WIDE, ROWS=ROWS, num_warps=1, num_stages=1,
    )  # fmt: skip


def sweep_columns(pull: Tensor, inside: Tensor, inverse: Tensor, block: Block) -> None:
    """Set each column of one block to its best code, first to last.

    inside: [k, k] of the Hessian, its rows contiguous.

    inverse: fp32 [k], of the damped diagonal.
    pull: fp32 [k, rows], contiguous; overwritten by the change of each error.
    """
    count, rows = pull.shape
    _sweep_columns[(triton.cdiv(rows, ROWS),)](
        pull, inside, inverse, block.scale, block.zero, block.group, block.error, block.codes,
        rows, inside.stride(0), block.levels, COUNT=count, PART=PART, WIDE=WIDE, ROWS=ROWS, num_warps=1, num_stages=1,
    )  # fmt: skip


def search(
    weight: Tensor, importance: Tensor, shrinks: Tensor, fine: Tensor, *, symmetric: bool, levels: int
) -> Tensor:
    """The best shrink of each group's range.

    weight fp32 [rows, groups, g], importance [groups, g] -> fp32 [rows, groups].
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
    def _nothing(pointer):
        pass

    @triton.jit
    def _nearest(x):
        """The nearest whole number, halves to even, of |x| < 2^22.

        Larger numbers stay too large to matter after a clamp.
        """
        return (x + 12582912.0) - 12582912.0

    @triton.jit
    def _to_bf16(x):
        """fp32 rounded to bf16's precision, halves to even, whatever the cast of the backend does."""
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)

    @triton.jit
    def _coupled(
        tile_ptr, moved_ptr, coupling_ptr, mine, row, rows, stride, start, stop,
        COUNT: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        """The columns `mine` of a block after the feedback of the columns from start to stop.

        [PART, rows] at tile_ptr.
        """
        wide = rows.to(tl.int64)
        own, real = (mine < COUNT)[:, None], (row < rows)[None, :]
        at = mine[:, None] * wide + row[None, :]
        tile = tl.load(tile_ptr + at, mask=own & real, other=0.0)
        for begin in range(start, stop, WIDE):
            other = begin + tl.arange(0, WIDE)
            known = (other < stop)[:, None] & real
            moved = tl.load(moved_ptr + other[:, None] * wide + row[None, :], mask=known, other=0.0)
            coupled = own & (other < stop)[None, :]
            coupling = tl.load(coupling_ptr + other[None, :] * stride + mine[:, None], mask=coupled, other=0.0)
            tile += tl.dot(coupling, moved, input_precision="tf32x3")
        tl.store(tile_ptr + at, tile, mask=own & real)
        tl.debug_barrier()  # reloaded so that no lane needs another lane's values
        return tl.load(tile_ptr + at, mask=own & real, other=0.0)

    @triton.jit
    def _quotient(x, scale, inverse):
        """x / scale, given 1 / scale, rounded to nearest in all but rare cases.

        The branches of a division would delay loads.
        """
        first = x * inverse
        return tl.fma(tl.fma(-first, scale, x), inverse, first)

    @triton.jit
    def _inverse(x):
        """1 / x, to the last place or nearly so, without a division's branches."""
        near = 1.0 / x
        return tl.fma(tl.fma(-x, near, 1.0), near, near)

    @triton.jit
    def _row(matrix_ptr, stride, j, mine, COUNT: tl.constexpr):
        """The elements `mine` of a row of a block's matrix.

        Of the nearest row where there is no such row.
        """
        return tl.load(
            matrix_ptr + tl.minimum(tl.maximum(j, 0), COUNT - 1) * stride + mine, mask=mine < COUNT, other=0.0
        )

    @triton.jit
    def _column(tile, chosen):
        """One column [rows] of a tile [PART, rows] that is in registers.

        As integers, since adding zeros costs nothing there.
        """
        bits = tl.sum(tl.where(chosen, tile.to(tl.int32, bitcast=True), 0), axis=0)
        return bits.to(tl.float32, bitcast=True)

    @triton.jit(do_not_specialize=["rows"])  # known multiples of 16 give each lane 4 rows and a share of the columns
    def _round_columns(
        target_ptr, feedback_ptr, scale_ptr, zero_ptr, group_ptr, error_ptr, codes_ptr, rows, stride, levels,
        COUNT: tl.constexpr, PART: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        wide = rows.to(tl.int64)
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        parts: tl.constexpr = (COUNT + PART - 1) // PART
        for step in range(parts):
            first = (parts - 1 - step) * PART
            mine = first + tl.arange(0, PART)
            real = (mine < COUNT)[:, None] & (row < rows)[None, :]
            at = mine[:, None] * wide + row[None, :]
            grouped = tl.load(group_ptr + mine, mask=mine < COUNT, other=0)[:, None] * wide + row[None, :]
            scales = tl.load(scale_ptr + grouped, mask=real, other=1.0)
            zeros = tl.load(zero_ptr + grouped, mask=real, other=0.0)
            errors = tl.load(error_ptr + at, mask=real, other=0.0)  # the weights of a column until it is rounded
            codes = tl.zeros_like(errors)  # loads come before the coupling, whose barrier would delay them
            inverses = _inverse(scales)
            tile = _coupled(
                target_ptr, error_ptr, feedback_ptr, mine, row, rows, stride, first + PART, COUNT, COUNT, WIDE
            )
            top = first + PART - 1
            row0, row1 = _row(feedback_ptr, stride, top, mine, COUNT), _row(feedback_ptr, stride, top - 1, mine, COUNT)
            row2, row3 = (
                _row(feedback_ptr, stride, top - 2, mine, COUNT),
                _row(feedback_ptr, stride, top - 3, mine, COUNT),
            )
            for i in tl.static_range(PART):  # a column beyond the last is 0 and stays so
                coming = _row(feedback_ptr, stride, top - i - 4, mine, COUNT)
                chosen = (mine == top - i)[:, None]
                scale, zero = _column(scales, chosen), _column(zeros, chosen)
                code = _nearest(_quotient(_column(tile, chosen), scale, _column(inverses, chosen)))
                code = tl.minimum(tl.maximum(code, -zero), levels - 1 - zero)
                error = _column(errors, chosen) - code * scale
                tile += row0[:, None] * error[None, :]
                errors = tl.where(chosen, error[None, :], errors)
                codes = tl.where(chosen, (code + zero)[None, :], codes)
                row0, row1, row2, row3 = row1, row2, row3, coming
            tl.store(error_ptr + at, errors, mask=real)
            tl.store(codes_ptr + at, codes.to(tl.uint8), mask=real)
            tl.debug_barrier()  # other lanes read the errors

    @triton.jit(do_not_specialize=["rows"])
    def _sweep_columns(
        pull_ptr, inside_ptr, inverse_ptr, scale_ptr, zero_ptr, group_ptr, error_ptr, codes_ptr, rows, stride, levels,
        COUNT: tl.constexpr, PART: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        wide = rows.to(tl.int64)
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        for part in range((COUNT + PART - 1) // PART):
            first = part * PART
            mine = first + tl.arange(0, PART)
            real = (mine < COUNT)[:, None] & (row < rows)[None, :]
            at = mine[:, None] * wide + row[None, :]
            grouped = tl.load(group_ptr + mine, mask=mine < COUNT, other=0)[:, None] * wide + row[None, :]
            scales = tl.load(scale_ptr + grouped, mask=real, other=1.0)
            zeros = tl.load(zero_ptr + grouped, mask=real, other=0.0)
            before = tl.load(codes_ptr + at, mask=real, other=0).to(tl.float32) - zeros
            after = before
            inverse = tl.load(inverse_ptr + mine, mask=mine < COUNT, other=0.0)[:, None]
            steps = inverse * _inverse(scales)
            error = tl.load(error_ptr + at, mask=real, other=0.0)
            tile = _coupled(pull_ptr, pull_ptr, inside_ptr, mine, row, rows, stride, 0, first, COUNT, WIDE)
            row0, row1 = _row(inside_ptr, stride, first, mine, COUNT), _row(inside_ptr, stride, first + 1, mine, COUNT)
            row2, row3 = (
                _row(inside_ptr, stride, first + 2, mine, COUNT),
                _row(inside_ptr, stride, first + 3, mine, COUNT),
            )
            for i in tl.static_range(PART):  # a column beyond the last is 0 and stays so
                coming = _row(inside_ptr, stride, first + i + 4, mine, COUNT)
                chosen = (mine == first + i)[:, None]
                scale, zero, level = _column(scales, chosen), _column(zeros, chosen), _column(before, chosen)
                best = _nearest(level + _column(tile, chosen) * _column(steps, chosen))
                best = tl.minimum(tl.maximum(best, -zero), levels - 1 - zero)
                tile += row0[:, None] * ((level - best) * scale)[None, :]
                after = tl.where(chosen, best[None, :], after)
                row0, row1, row2, row3 = row1, row2, row3, coming
            moved = (before - after) * scales
            tl.store(error_ptr + at, error + moved, mask=real)
            tl.store(codes_ptr + at, (after + zeros).to(tl.uint8), mask=real)
            tl.store(pull_ptr + at, moved, mask=real)
            tl.debug_barrier()  # other lanes read the changes

    @triton.jit
    def _loss(w, importance, low, high, shrink, levels, SYMMETRIC: tl.constexpr):
        """Weighted squared error of rounding w [groups, width].

        The range is shrunk by `shrink` [groups].
        """
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

    @triton.jit(do_not_specialize=["total", "groups"])
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
