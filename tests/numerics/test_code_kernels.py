"""`requant.numerics.code_kernels` against the plain functions of `requant.heal.codes`.

In Triton's interpreter where there is no GPU. Only sums over a group have another order.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from requant.heal import latents, student
from requant.heal.codes import Codes, DequantizedProduct
from requant.numerics import triton_kernels
from requant.numerics.grid import deployable

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.gpu(interpreted=True)
DEVICE = torch.device("cuda" if CUDA else "cpu")
BF16 = pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not CUDA, reason="cut off there"))
SHAPES = [  # rows, columns, groups: whole programs, parts of them, groups across the middle, a row as one group
    (64, 128, 2),
    (37, 192, 3),
    (5, 120, 5),
    (3, 2600, 1),
    (21, 96, 2),
]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Switches `triton_kernels.usable` on and off."""
    switch = [True]
    monkeypatch.setattr(triton_kernels, "usable", lambda _: switch[0])
    return switch


def codes_of(bits: int, rows: int, columns: int, groups: int, *, shuffled: bool = False) -> Codes:
    """Random codes, signed scales and zero points of every value."""
    generator = torch.Generator().manual_seed(bits + rows)
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)
    scale = deployable(torch.randn(rows, groups, generator=generator) * 0.1)
    zero = torch.randint(0, 2**bits, (groups, rows), generator=generator).float().T  # as a transposed tensor of a file
    g_idx = torch.arange(columns) // (columns // groups)
    if shuffled:
        g_idx = g_idx[torch.randperm(columns, generator=generator)]
    return Codes.of(*(t.to(DEVICE) for t in (codes, scale, zero, g_idx)), bits=bits, where="x")


def layer_of(codes: Codes, dtype: torch.dtype) -> tuple[student.ScaledLinear, Tensor, Tensor]:
    """A layer whose scales and codes are trained, with gradients that are not zero before; both gradients."""
    layer = student.ScaledLinear(codes, None, dtype)
    scales, trained = student.trainable_scales({"x": layer}, dtype), student.train_codes("x", layer, None)
    for gradient in (scales.offset.grad, trained.offset.grad):
        assert gradient is not None
        gradient.copy_(torch.linspace(-1, 1, gradient.numel()).view(gradient.shape))
    assert scales.offset.grad is not None
    assert trained.offset.grad is not None
    return layer, scales.offset.grad, trained.offset.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_weight_is_the_same(
    kernels: list[bool], shape: tuple[int, int, int], bits: int, dtype: torch.dtype
) -> None:
    codes = codes_of(bits, *shape)
    fused = codes.weight(codes.scale.to(dtype))
    kernels[0] = False
    assert torch.equal(fused, codes.weight(codes.scale.to(dtype)))
    assert fused.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_the_same(
    kernels: list[bool], shape: tuple[int, int, int], bits: int, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(1)).to(DEVICE)
    outer = torch.randn(2, 3, shape[0], generator=torch.Generator().manual_seed(2)).to(DEVICE)
    found = []
    for kernels[0] in (True, False):
        layer, of_scales, of_codes = layer_of(codes_of(bits, *shape, shuffled=bits == 4), dtype)
        given = x.clone().requires_grad_()
        out = layer(given)
        out.backward(outer.to(out.dtype))
        found.append((out.detach(), given.grad, of_codes, of_scales))
    for fused, plain in zip(*(pair[:3] for pair in found), strict=True):
        assert torch.equal(fused, plain)
    fused, plain = (pair[3].double() for pair in found)
    terms = 2 * (shape[1] // shape[2]) ** 0.5 * torch.finfo(dtype).eps  # of roundings of as many terms
    torch.testing.assert_close(fused, plain, rtol=terms, atol=terms * float(plain.abs().max()))


@pytest.mark.parametrize("tuned", ["scales", "codes", "neither"])
def test_only_what_is_tuned_gets_a_gradient(kernels: list[bool], tuned: str) -> None:
    """A leaf without a gradient yet is given one."""
    codes = codes_of(4, 21, 96, 2)
    x = torch.randn(7, 96, device=DEVICE, requires_grad=True)
    offset = torch.zeros(21, 2, device=DEVICE, requires_grad=tuned == "scales")
    latent = torch.zeros(21, 96, device=DEVICE, requires_grad=True) if tuned == "codes" else None
    found = []
    for kernels[0] in (True, False):
        for leaf in (x, offset, latent):
            if leaf is not None:
                leaf.grad = None
        out: Tensor = DequantizedProduct.apply(x, offset, latent, codes, codes.scale)  # type: ignore[no-untyped-call]
        out.square().sum().backward()
        found.append([None if leaf is None else leaf.grad for leaf in (x, offset, latent)])
    for fused, plain in zip(*found, strict=True):
        assert (fused is None) == (plain is None)
        if fused is not None and plain is not None:
            torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max()))
    assert [gradient is not None for gradient in found[0]] == [True, tuned == "scales", tuned == "codes"]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_latents_are_kept_rounded_and_packed_alike(kernels: list[bool], shape: tuple[int, int, int], bits: int) -> None:
    """Also halves, which go to the even number, and what has left the range at either end."""
    rows, columns, _ = shape
    generator = torch.Generator().manual_seed(bits)
    latent = (torch.rand(rows, columns, generator=generator) * 1.4 - 0.2) * (2**bits - 1)
    latent[0, :8] = torch.tensor([0.5, 1.5, 2.5, -0.5, -7.0, 2**bits + 3, 2**bits - 1.5, 2**bits - 0.5])
    found = []
    for kernels[0] in (True, False):
        codes, moved = codes_of(bits, *shape), latent.to(DEVICE, copy=True)
        codes.round_from(moved, latents.EDGE)
        found.append((codes.packed, moved))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert int(codes.integers().max()) == 2**bits - 1
