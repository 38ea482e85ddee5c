"""`requant.formats.gguf_blocks`, held against the package `gguf`."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
import torch

from requant.formats import gguf_blocks
from requant.formats.quantized_format import PackError


def solved(bits: int, group: int, *, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random codes [16, 256], scales of both signs, zero points."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (16, 256), generator=generator).to(torch.uint8)
    scale = torch.randn(16, 256 // group, generator=generator).half().float()
    zero = torch.randint(0, 2**bits, scale.shape, generator=generator).float()
    return codes, scale, torch.full_like(scale, float(2 ** (bits - 1))) if symmetric else zero


@pytest.mark.parametrize("group", [32, 64, 256])
@pytest.mark.parametrize(
    ("bits", "symmetric", "kind"),
    [
        (4, True, "Q4_0"),
        (3, True, "Q4_0"),
        (2, False, "Q4_0"),
        (3, False, "Q4_0"),
        (8, True, "Q8_0"),
        (4, False, "Q4_1"),
    ],
)
def test_the_package_decodes_our_blocks_to_our_weights(bits: int, symmetric: bool, kind: str, group: int) -> None:
    codes, scale, zero = solved(bits, group, symmetric=symmetric)
    assert gguf_blocks.kind_of(bits, group, symmetric=symmetric) == kind
    stored = gguf_blocks.pack(kind, codes, scale, zero)
    assert stored.shape == (16, 256 // 32 * gguf_blocks.BYTES[kind])
    number = gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[number] == (gguf_blocks.BLOCK, gguf_blocks.BYTES[kind])
    theirs = torch.from_numpy(gguf.quants.dequantize(stored.numpy(), number))
    assert torch.equal(theirs, gguf_blocks.unpack(kind, stored))
    columns = torch.arange(256) // group
    ours = (codes.float() - zero[:, columns]) * scale[:, columns]
    if kind != "Q4_1":
        assert torch.equal(theirs, ours)
    else:  # the minimum, zero times scale, in float16: half a unit of 2^-10 of it, and fp32 sums
        bound = (zero * scale).abs()[:, columns] * 2.0**-11 + ours.abs() * 2.0**-20 + 1e-7
        assert bool(((theirs - ours).abs() <= bound).all())


def test_all_zeros_stay_zero() -> None:
    codes = torch.full((4, 32), 8, dtype=torch.uint8)
    stored = gguf_blocks.pack("Q4_0", codes, torch.ones(4, 1), torch.full((4, 1), 8.0))
    assert np.array_equal(stored[0].numpy(), np.array([0, 0x3C] + [0x88] * 16, dtype=np.uint8))


def test_what_fits_no_block_is_refused() -> None:
    codes, scale, zero = solved(8, 32, symmetric=True)
    with pytest.raises(PackError, match="no multiple of a block of 32"):
        gguf_blocks.kind_of(4, 48, symmetric=True)
    with pytest.raises(PackError, match="8 bits with zero points fit no block"):
        gguf_blocks.kind_of(8, 32, symmetric=False)
    with pytest.raises(PackError, match="Q4_0 has -8 to 7"):
        gguf_blocks.pack("Q4_0", codes, scale, zero)
    with pytest.raises(PackError, match="not exact in float16"):
        gguf_blocks.pack("Q8_0", codes, scale * 1e6, zero)


def test_parts_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in parts give the same blocks; one wrong weight, and a scale that is no number, are seen in the last one."""
    codes, scale, zero = torch.randint(0, 16, (7, 64)).to(torch.uint8), torch.full((7, 2), 0.5), torch.full((7, 2), 8.0)
    monkeypatch.setattr(gguf_blocks, "PART", 3 * 64)
    assert [(p.start, p.stop) for p in gguf_blocks.parts(7, 64)] == [(0, 3), (3, 6), (6, 9)]
    stored = gguf_blocks.pack_in_parts("Q4_0", codes, scale, zero)
    assert torch.equal(stored, gguf_blocks.pack("Q4_0", codes, scale, zero))
    assert gguf_blocks.steps_off("Q4_0", stored, codes, scale, zero) == 0
    other = codes.clone()
    other[-1, -1] ^= 1
    assert gguf_blocks.steps_off("Q4_0", stored, other, scale, zero) == 1
    stored[-1, :2] = torch.tensor([torch.nan]).half().view(torch.uint8)
    assert math.isnan(gguf_blocks.steps_off("Q4_0", stored, codes, scale, zero))
