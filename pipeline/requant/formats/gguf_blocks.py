"""Blocks of 32 weights as GGUF stores them: packing of integer codes, and decoding.

Q4_0  fp16 d, 16 bytes of codes          w = d * (q - 8)      weight i in the low half of byte i, weight i + 16 above it
Q4_1  fp16 d, fp16 m, 16 bytes of codes  w = d * q + m        as Q4_0
Q8_0  fp16 d, 32 signed bytes            w = d * q

A group of 64 or 128 inputs, or a whole row, becomes several blocks with the same scale. d may be negative.
Source: ggml-common.h and ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from requant.formats.quantized_format import PackError

BLOCK = 32
BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}  # of one block
PLAIN = (("F16", torch.float16), ("BF16", torch.bfloat16))
PART = 2**20  # values that are computed at once: most matrices that float16 does not hold show it in the first
LARGEST_ROUNDING = 2.0**-7  # of Q4_1's minimum, in steps of the scale: half an ulp of float16 at 15 steps is 0.0073


def kind_of(bits: int, group: int, *, symmetric: bool) -> str:
    """The kind of block that holds codes of these settings; group: inputs of a group.

    Exactly, but for Q4_1, whose minimum is rounded to float16. Raises PackError when there is none.
    """
    if group % BLOCK:
        raise PackError(f"groups of {group} inputs are no multiple of a block of {BLOCK}")
    if bits == 8:
        if not symmetric:
            raise PackError("8 bits with zero points fit no block: Q8_0 has none")
        return "Q8_0"
    return "Q4_0" if symmetric or bits < 4 else "Q4_1"


def plain_kind(values: Tensor) -> tuple[str, torch.dtype]:
    """The narrowest type of GGUF that holds values exactly: float16, which every backend multiplies, if it does."""
    parts = torch.split(values.reshape(-1), PART)
    for kind, dtype in PLAIN:
        if all(torch.equal(part.to(dtype).to(part.dtype), part) for part in parts):
            return kind, dtype
    return "F32", torch.float32


def pack(kind: str, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Blocks of one weight, uint8 [out, bytes of a row].

    codes: uint8 [out, in]. scale, zero: fp32 [out, groups], groups of neighbours.
    Raises PackError when a scale is not exact in float16, or a code does not fit.
    """
    rows, columns = codes.shape
    size = columns // scale.shape[1]
    half = scale.half()
    if not torch.equal(half.float(), scale) or not torch.isfinite(half).all():
        raise PackError("a scale is not exact in float16")
    blocks = codes.reshape(rows, -1, BLOCK)
    scales, zeros = (t.repeat_interleave(size // BLOCK, dim=1) for t in (half, zero))
    if kind == "Q4_1":
        return torch.cat([_bytes(scales), _bytes((-zeros * scales.float()).half()), _nibbles(blocks)], dim=2).flatten(1)
    signed = blocks.short() - zeros.short().unsqueeze(2)
    low, high = (-8, 7) if kind == "Q4_0" else (-128, 127)
    if int(signed.min()) < low or int(signed.max()) > high:
        raise PackError(
            f"codes less zero points span {int(signed.min())} to {int(signed.max())}, {kind} has {low} to {high}"
        )
    body = _nibbles((signed + 8).to(torch.uint8)) if kind == "Q4_0" else signed.to(torch.int8).view(torch.uint8)
    return torch.cat([_bytes(scales), body], dim=2).flatten(1)


def codes(kind: str, stored: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [out, in], and scale fp32 [out, blocks], of symmetric blocks uint8 [out, bytes of a row]."""
    blocks = stored.reshape(stored.shape[0], -1, BYTES[kind])
    scale, body = _halves(blocks[..., :2]).squeeze(2), blocks[..., 2:]
    signed = body.contiguous().view(torch.int8).short() + 128 if kind == "Q8_0" else _codes(body)
    return signed.to(torch.uint8).flatten(1), scale


def unpack(kind: str, stored: Tensor) -> Tensor:
    """The weights fp32 [out, in] of blocks uint8 [out, bytes of a row]."""
    blocks = stored.reshape(stored.shape[0], -1, BYTES[kind])
    return _DECODERS[kind](blocks).flatten(1)


def parts(rows: int, columns: int) -> list[slice]:
    """Rows of a matrix in parts of a million values, so that what is computed of them takes little memory beside it."""
    size = max(1, PART // columns)
    return [slice(start, start + size) for start in range(0, rows, size)]


def pack_in_parts(kind: str, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`pack`, some rows at a time."""
    return torch.cat([pack(kind, codes[p], scale[p], zero[p]) for p in parts(*codes.shape)])


def steps_off(kind: str, stored: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> float:
    """The largest difference of a weight in blocks from what codes say, in steps of its scale; others as of `pack`."""
    largest = []
    for p in parts(*codes.shape):
        scales = scale[p].unsqueeze(2)  # of a group, without an index a weight
        grouped = (len(scales), scale.shape[1], -1)
        expected = (codes[p].float().reshape(grouped) - zero[p].unsqueeze(2)) * scales
        largest.append(((unpack(kind, stored[p]).reshape(grouped) - expected) / scales).abs().max())
    return float(torch.stack(largest).max())  # NaN where one is


def _bytes(halves: Tensor) -> Tensor:
    """float16 [out, blocks] -> uint8 [out, blocks, 2]."""
    return halves.contiguous().view(torch.uint8).reshape(*halves.shape, 2)


def _halves(data: Tensor) -> Tensor:
    """uint8 [out, blocks, 2] -> fp32 [out, blocks, 1]."""
    return data.contiguous().view(torch.float16).float()


def _nibbles(codes: Tensor) -> Tensor:
    """uint8 [out, blocks, 32] below 16 -> uint8 [out, blocks, 16]."""
    return codes[..., :16] | (codes[..., 16:] << 4)


def _codes(data: Tensor) -> Tensor:
    """The inverse of `_nibbles`, fp32."""
    return torch.cat([data & 15, data >> 4], dim=2).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return (_codes(blocks[..., 2:]) - 8) * _halves(blocks[..., :2])


def _q4_1(blocks: Tensor) -> Tensor:
    return _codes(blocks[..., 4:]) * _halves(blocks[..., :2]) + _halves(blocks[..., 2:4])


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[..., 2:].contiguous().view(torch.int8).float() * _halves(blocks[..., :2])


_DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0}
