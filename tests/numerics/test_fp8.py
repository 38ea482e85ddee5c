"""`requant.numerics.fp8` against transformers' decoder, bit for bit, and against loops."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from requant.numerics import fp8


def codes(*shape: int, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """Codes of all bit patterns but NaN and infinity."""
    bits = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    values = bits.view(dtype)
    return torch.where(values.float().isfinite(), values.float(), 1.5).to(dtype)


@pytest.mark.parametrize("dtype", fp8.DTYPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "grid"), [((256, 384), (2, 3)), ((3, 64, 128), (3, 2, 1))])
def test_blocks_are_what_transformers_decodes(
    dtype: torch.dtype, scale_dtype: torch.dtype, shape: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    stored = codes(*shape, dtype=dtype)
    scale = (torch.rand(grid, generator=torch.Generator().manual_seed(1)) * 0.01 + 1e-4).to(scale_dtype)
    block = (shape[-2] // grid[-2], shape[-1] // grid[-1])
    ours = fp8.decode(stored, scale, fp8.block_of(stored.shape, scale.shape, block))
    for output in (torch.float32, torch.bfloat16):
        theirs = Fp8Dequantize(None)._dequantize_one(stored, scale, output)
        assert torch.equal(ours.to(output), theirs)


@pytest.mark.parametrize(
    ("grid", "block"),
    [((), None), ((1,), None), ((1, 1), (128, 128)), ((70,), None), ((70, 1), None), ((3, 2), (32, 32))],
    ids=["number", "one", "one of a grid", "rows", "a column of rows", "blocks with smaller last ones"],
)
def test_every_kind_of_scale(grid: tuple[int, ...], block: tuple[int, int] | None) -> None:
    stored, scale = codes(70, 50), torch.rand(grid, generator=torch.Generator().manual_seed(2)) + 0.5
    found = fp8.block_of((70, 50), grid, block)
    ours = fp8.decode(stored, scale, found)
    flat = scale.reshape(-(-70 // found[0]), -(-50 // found[1]))
    for i, j in ((0, 0), (31, 49), (32, 31), (69, 32), (69, 49)):
        assert float(ours[i, j]) == float(stored[i, j].float() * flat[i // found[0], j // found[1]])


@pytest.mark.parametrize(("grid", "block"), [((2, 2), None), ((2, 3), (32, 32)), ((50,), None)])
def test_scales_that_do_not_fit(grid: tuple[int, ...], block: tuple[int, int] | None) -> None:
    with pytest.raises(fp8.Fp8Error, match=r"scales .* of a weight \[70, 50\] are neither one a tensor nor one a row"):
        fp8.block_of((70, 50), grid, block)


@pytest.mark.parametrize(
    ("shape", "scale"),
    [((64, 64), (2, 2, 2)), ((4, 64, 64), (2, 2, 2)), ((4, 64, 64), (3, 1, 1)), ((64, 64), (2, 64, 1))],
)
def test_grids_of_another_number_of_matrices_are_refused(shape: tuple[int, ...], scale: tuple[int, ...]) -> None:
    with pytest.raises(fp8.Fp8Error, match="are neither one a tensor nor one a row nor one a block of 32 x 32"):
        fp8.block_of(shape, scale, (32, 32))


def test_blocks_larger_than_a_weight() -> None:
    """A config may say any size: no memory is taken by it."""
    stored, scale = codes(70, 50), torch.tensor([[2.0], [3.0]])
    block = fp8.block_of((70, 50), (2, 1), (48, 10**12))
    assert block == (48, 50)
    expected = stored.float() * torch.cat([torch.full((48, 1), 2.0), torch.full((22, 1), 3.0)])
    assert torch.equal(fp8.decode(stored, scale, block), expected)
