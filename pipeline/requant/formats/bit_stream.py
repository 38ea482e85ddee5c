"""Codes as a dense little-endian stream of bits in words, and exact scales, for all layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from requant.formats.quantized_format import PackError

WORD = 32

BITS = (2, 3, 4, 8)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack codes down each column as a stream of bits.

    codes [n, m] of any dtype, whole numbers in 0..2^bits-1, n a multiple of 32 -> int32 [n*bits/32, m].
    3-bit codes straddle words (10-1-10-1-10); the same little-endian bit stream describes every width.
    Raises PackError for any other code: it would change its neighbours, or become another one.
    """
    n, m = codes.shape
    if n % WORD:
        raise PackError(f"{n} codes in a column are not a multiple of {WORD}")
    check_whole("codes", codes, 0, 2**bits - 1)
    if WORD % bits == 0:
        wide = codes.to(torch.int32).reshape(-1, WORD // bits, m)
        words = wide[:, 0].clone()
        for i in range(1, WORD // bits):
            words |= wide[:, i] << (bits * i)
        return words
    block = codes.to(torch.int64).reshape(-1, WORD, m)
    words64 = torch.zeros(block.shape[0], bits, m, dtype=torch.int64, device=codes.device)
    for i in range(WORD):
        word, shift = divmod(bits * i, WORD)
        words64[:, word] |= block[:, i] << shift
        if shift + bits > WORD:
            words64[:, word + 1] |= block[:, i] >> (WORD - shift)
    low = words64 & 0xFFFFFFFF
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32).reshape(-1, m)


def check_whole(what: str, values: Tensor, low: int, high: int) -> None:
    """Raise PackError unless all values are whole numbers from `low` to `high`; NaN is none."""
    least, most = (float(v) for v in torch.aminmax(values))
    if not (low <= least and most <= high):
        raise PackError(f"{what} span {least:g} to {most:g}, expected {low} to {high}")
    if values.is_floating_point():
        fractions = values != values.round()
        if bool(fractions.any()):
            raise PackError(f"{what} are not whole numbers, e.g. {float(values[fractions][0]):g}")


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_rows`: int32 [k, m] -> uint8 [k*32/bits, m]."""
    m = words.shape[1]
    mask = 2**bits - 1
    if 8 % bits == 0:
        octets = words.reshape(-1).view(torch.uint8).reshape(-1, m, 4).transpose(1, 2)  # [k, 4, m]
        codes = torch.empty(len(words), 4, 8 // bits, m, dtype=torch.uint8, device=words.device)
        for i in range(8 // bits):
            codes[:, :, i] = octets >> (bits * i) & mask
        return codes.reshape(-1, m)
    wide = (words.to(torch.int64) & 0xFFFFFFFF).reshape(-1, bits, m)
    out = torch.empty(wide.shape[0], WORD, m, dtype=torch.uint8, device=words.device)
    for i in range(WORD):
        word, shift = divmod(bits * i, WORD)
        value = wide[:, word] >> shift
        if shift + bits > WORD:
            value |= wide[:, word + 1] << (WORD - shift)
        out[:, i] = (value & mask).to(torch.uint8)
    return out.reshape(-1, m)


def fitting_groups(rows: int | None, columns: int, group_size: int) -> int:
    """Inputs of a group of a weight [rows (out), columns (in)], all of them for a group_size of -1.

    rows: None where nothing is packed along them. Raises PackError when groups or words of 32 bits do not divide its
    sizes.
    """
    group = columns if group_size == -1 else group_size
    if columns % group:
        fits = [g for g in (128, 64, 32) if columns % g == 0]
        raise PackError(
            f"group_size {group_size} does not divide its {columns} inputs; use {' or '.join(map(str, [*fits, -1]))}"
        )
    if columns % WORD or (rows or 0) % WORD:
        both = f"shape [{rows}, {columns}] is not a multiple of {WORD} both ways"
        sizes = both if rows else f"{columns} inputs are no multiple of {WORD}"
        raise PackError(f"its {sizes}; leave it in 16 bit (in a recipe: skip it with an override)")
    return group


def exact_scales(columns: int, scale: Tensor, zero: Tensor) -> Tensor:
    """Scales fp32 [out, groups] as float16.

    Raises PackError unless that is exact, and zero points [out, groups] and the number of inputs fit to them.
    """
    if columns % scale.shape[1] or zero.shape != scale.shape:
        raise PackError(f"{columns} inputs, scales {list(scale.shape)} and zero points {list(zero.shape)} do not fit")
    half = scale.half()
    if not torch.equal(half.float(), scale) or not torch.isfinite(half).all():
        raise PackError("a scale is not exact in float16")
    return half
