"""`requant.products` and `requant.substitution`: parts of TF32 make up fp32; with fp64 beside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from requant import products, substitution
from requant.cholesky import shared_cholesky


def _held(x: Tensor) -> Tensor:
    """What tensor cores take of it: no more than 10 bits of mantissa."""
    return (x.view(torch.int32) & -(2**13)).view(torch.float32)


def _damped(n: int) -> tuple[Tensor, Tensor]:
    """(an ill-conditioned symmetric matrix in fp64, its factor in fp32)."""
    torch.manual_seed(0)
    x = torch.randn(2 * n, n, dtype=torch.float64) * torch.logspace(0, -2, n, dtype=torch.float64)
    matrix = x.T @ x
    matrix.diagonal().add_(0.01 * matrix.diagonal().mean())
    return matrix, torch.linalg.cholesky(matrix).float()


@pytest.fixture
def on_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products on the CPU see of their factors what TF32 has room for."""
    whole = Tensor.addmm_

    def rounded(self: Tensor, a: Tensor, b: Tensor, **options: int) -> Tensor:
        if torch.get_float32_matmul_precision() == "high":
            a, b = _held(a), _held(b)
        return whole(self, a, b, **options)

    monkeypatch.setattr(Tensor, "addmm_", rounded)


def test_parts_add_up_and_the_first_survives_tensor_cores() -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(10_000) * 10.0**e for e in range(-20, 20, 4)] + [torch.tensor([0.0, 1.0, -(2.0**60)])])
    high, low = products.parts(x)
    assert torch.equal(high + low, x)
    assert torch.equal(_held(high), high)
    assert bool((low.abs() <= x.abs() * 2.0**-11).all())
    assert bool(((low - _held(low)).abs() <= x.abs() * 2.0**-21).all())
    for strange in (torch.nan, torch.inf):
        assert not torch.isfinite(sum(products.parts(torch.tensor([strange])))).any()
    strided = torch.randn(6, 5).T[1:]
    assert torch.equal(sum(products.parts(strided)), strided)


@pytest.mark.usefixtures("on_tensor_cores")
def test_a_product_in_parts_is_as_good_as_a_whole_one() -> None:
    torch.manual_seed(0)
    a, b, total = torch.randn(64, 300), torch.randn(300, 48), torch.randn(64, 48)
    exact = total.double() - a.double() @ b.double()
    scale = a.abs().double() @ b.abs().double()

    def error(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> float:
        mine = total.clone()
        products.add_product(mine, left, right, sign=-1)
        return float(((mine - exact).abs() / scale).max())

    assert error(products.parts(a), products.parts(b)) < 2e-7
    assert error((a,), (b,)) < 2e-7
    with products.tensor_cores():
        alone = float(((torch.clone(total).addmm_(a, b, alpha=-1) - exact).abs() / scale).max())
        assert error((a,), (b,)) < 2e-7  # whole is whole, whatever is allowed around it
    assert alone > 1e-5


@pytest.mark.usefixtures("on_tensor_cores")
@pytest.mark.parametrize(("n", "block"), [(96, 32), (100, 32), (30, 64), (1, 8)])
def test_solving_in_parts_is_as_good_as_torchs(n: int, block: int) -> None:
    matrix, lower = _damped(n)
    lower += torch.full_like(lower, 7.0).triu(1)  # nobody looks there
    columns = torch.randn(n, 9)
    exact = torch.linalg.solve(matrix, columns.double())
    theirs = torch.cholesky_solve(columns, lower.tril())
    mine = substitution.by_parts(columns.clone(), lower, block)

    def error(x: Tensor) -> float:
        return float((x - exact).norm() / exact.norm())

    assert error(mine) < 2 * error(theirs) + 1e-6


@pytest.mark.usefixtures("on_tensor_cores")
@pytest.mark.parametrize(("n", "block"), [(96, 32), (100, 32), (30, 64)])
def test_factoring_in_parts_is_as_good_as_whole(n: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, _ = _damped(n)

    def error() -> float:
        lower, info = shared_cholesky(matrix.float(), 0, 1, lambda *_: lambda: None, block)
        assert int(info) == 0
        return float((lower.double() @ lower.T.double() - matrix).norm() / matrix.norm())

    whole = error()
    monkeypatch.setattr(products, "has_parts", lambda _: True)
    assert error() < 2 * whole + 1e-7


def test_on_a_cpu_it_is_torchs() -> None:
    _, lower = _damped(40)
    columns = torch.randn(40, 3)
    assert torch.equal(substitution.cholesky_solve(columns.clone(), lower), torch.cholesky_solve(columns, lower))


def test_precisions_end_with_their_blocks() -> None:
    before = torch.get_float32_matmul_precision()
    with products.tensor_cores():
        assert torch.get_float32_matmul_precision() == "high"
        with products.full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    with pytest.raises(ZeroDivisionError), products.tensor_cores():
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("n", [1000, 3000])
def test_on_a_gpu_solving_in_parts_is_as_good_as_torchs(n: int) -> None:
    matrix, lower = _damped(n)
    columns = torch.randn(n, 500)
    exact = torch.linalg.solve(matrix, columns.double())
    device = torch.device("cuda")
    lower, columns = lower.to(device), columns.to(device)
    assert products.has_parts(columns)
    theirs = torch.cholesky_solve(columns, lower).cpu()
    mine = substitution.cholesky_solve(columns, lower).cpu()
    assert (mine - exact).norm() < 4 * (theirs - exact).norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_product_in_parts_is_as_good_as_a_whole_one() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(512, 8192, device="cuda"), torch.randn(8192, 256, device="cuda")
    scale = a.abs().double() @ b.abs().double()

    def error(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> float:
        mine = torch.zeros(512, 256, device="cuda")
        products.add_product(mine, left, right)
        return float(((mine - a.double() @ b.double()).abs() / scale).max())

    assert error(products.parts(a), products.parts(b)) < 4 * error((a,), (b,))
