"""8-bit floats (E4M3, E5M2) with a scale a tensor, a row or a block. Decoding only.

w[i, j] = float(code[i, j]) * scale[i // rows, j // columns]          in fp32: one rounding a value
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)  # the last: powers of two


class Fp8Error(ValueError):
    """Codes and scales do not belong together; the message says what was found and what was expected."""


def block_of(shape: tuple[int, ...], scale: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int]:
    """(rows, columns) of codes that share a scale.

    shape: of the codes, [..., out, in]. scale: of the scales: one number, one a row, or a grid of blocks of the size
    `block`; the last ones of a grid may be smaller. One grid for all matrices, or one for each.
    Raises Fp8Error for others.
    """
    rows, columns = shape[-2:]
    grid = scale[-2:] if len(scale) > 1 else (*scale, 1) if scale else (1, 1)
    found = None
    if grid == (1, 1):
        found = rows, columns
    elif grid == (rows, 1):
        found = 1, columns
    elif block is not None and grid == (-(-rows // block[0]), -(-columns // block[1])):
        found = min(block[0], rows), min(block[1], columns)
    if found is not None and (prod(scale) == prod(grid) or scale[:-2] == shape[:-2]):
        return found
    raise Fp8Error(
        f"scales {list(scale)} of a weight {list(shape)} are neither one a tensor nor one a row"
        + (f" nor one a block of {block[0]} x {block[1]}" if block else ", and no weight_block_size is given")
    )


def decode(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Values fp32 of the shape of `codes`.

    codes: 8-bit floats [..., out, in]. scale: floating point, [..., grid of blocks]. block: from `block_of`.
    Bit-identical to transformers' decoder in fp32.
    """
    values = codes.float()
    rows, columns = values.shape[-2:]
    down, across = -(-rows // block[0]), -(-columns // block[1])
    factors = scale.float().reshape(*values.shape[:-2] if scale.numel() > down * across else (), down, across)
    if rows % block[0] == 0 and columns % block[1] == 0:
        values.view(*values.shape[:-2], down, block[0], across, block[1]).mul_(factors[..., :, None, :, None])
        return values
    wide = factors.repeat_interleave(block[1], dim=-1)[..., :columns]
    return values.mul_(wide.repeat_interleave(block[0], dim=-2)[..., :rows, :])
