"""MXFP4: blocks of 32 4-bit floats (E2M1) that share a power of two (E8M0). Decoding only.

OCP Microscaling Formats 1.0, section 5.3, as gpt-oss stores it:

    code[2j], code[2j+1] = byte[j] & 15, byte[j] >> 4
    w[32 g + i] = E2M1[code[32 g + i]] * 2^(scale[g] - 127)

Every value is exact in bfloat16: two digits and bfloat16's exponents.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
_HALF = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 = torch.tensor(_HALF + [-v for v in _HALF])  # by code: the fourth bit is the sign


def decode(blocks: Tensor, scales: Tensor) -> Tensor:
    """Values bfloat16 [..., 32 * groups] of packed codes.

    blocks: uint8 [..., groups, 16]. scales: uint8 [..., groups]. Bit-identical to transformers' decoder.
    """
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)  # [..., groups, 32]
    values = E2M1.to(device=blocks.device, dtype=torch.bfloat16)[codes.int()]
    torch.ldexp(values, scales.int()[..., None] - 127, out=values)
    return values.flatten(-2)
