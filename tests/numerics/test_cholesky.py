"""`requant.numerics.cholesky`: solving by blocks against fp64.

Factoring over several ranks: tests/runtime/test_ranks.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from requant.numerics import cholesky

SIZES = [(1, 4), (4, 4), (10, 4), (64, 64), (200, 96), (130, 64), (256, 256), (300, 256), (70, 35)]  # n, block


def factor(n: int) -> Tensor:
    torch.manual_seed(n)
    x = torch.randn(2 * n, n, dtype=torch.float64)
    return torch.linalg.cholesky(x.T @ x / n + 0.01 * torch.eye(n)).float()


@pytest.mark.parametrize(("n", "block"), SIZES)
@pytest.mark.parametrize("layout", ["rows", "columns"])  # torch's own factor lies columns first on a GPU
def test_what_solves_by_blocks_solves(n: int, block: int, layout: str) -> None:
    lower = factor(n)
    lower = lower if layout == "rows" else lower.T.contiguous().T
    wanted = torch.randn(n, 7)
    solved = cholesky.solve(lower, wanted.clone(), block)
    exact = torch.cholesky_solve(wanted.double(), lower.double())
    theirs = torch.cholesky_solve(wanted, lower)
    assert float((solved - exact).norm()) <= 4 * float((theirs - exact).norm()) + 1e-6 * float(exact.norm())


@pytest.mark.parametrize(("n", "block"), SIZES)
def test_inverses_are_those_of_the_triangles(n: int, block: int) -> None:
    lower = factor(n)
    found = cholesky.inverses(lower, block)
    assert found.shape == (-(-n // block), block, block)
    for number, inverse in enumerate(found):
        here = slice(number * block, min((number + 1) * block, n))
        k = here.stop - here.start
        assert torch.allclose(inverse[:k, :k] @ lower[here, here], torch.eye(k), atol=1e-4)
        assert torch.equal(inverse.triu(1), torch.zeros(block, block))
        assert torch.equal(inverse[k:, k:], torch.eye(block - k))
        assert not inverse[k:, :k].any()


def test_solving_keeps_to_full_precision_where_products_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """In TF32 substitution carries errors on, so fp32 is set; the caller's setting is restored."""
    seen = []
    matmul = Tensor.addmm_
    monkeypatch.setattr(
        Tensor, "addmm_", lambda *a, **k: (seen.append(torch.get_float32_matmul_precision()), matmul(*a, **k))[1]
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        cholesky.solve(factor(12), torch.randn(12, 3), 4)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}
    assert len(seen) == 6
