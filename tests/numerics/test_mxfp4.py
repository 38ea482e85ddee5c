"""`requant.numerics.mxfp4` against transformers' decoder, bit for bit."""

from __future__ import annotations

import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from requant.numerics import mxfp4


def test_every_code_and_scale_is_what_transformers_decodes() -> None:
    """All 256 pairs of codes with all scales but the one that E8M0 keeps for NaN, as [experts, out, groups, 16]."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 255, 1, 1)
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).repeat(1, 1, 16)
    ours = mxfp4.decode(blocks, scales)
    for dtype in (torch.bfloat16, torch.float32):
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
        assert torch.equal(ours.to(dtype), theirs)
        assert torch.equal(ours.to(dtype).signbit(), theirs.signbit())


def test_the_order_of_a_byte() -> None:
    """The low half first; 2^(scale - 127)."""
    blocks = torch.zeros(1, 16, dtype=torch.uint8)
    blocks[0, 0] = 0x9_2  # 1.0, then -0.5
    values = mxfp4.decode(blocks, torch.tensor([129], dtype=torch.uint8))
    assert values.dtype == torch.bfloat16
    assert values[:3].tolist() == [4.0, -2.0, 0.0]
