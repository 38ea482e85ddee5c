"""`requant.numerics.hessian`: sums over batches against one product of all, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from requant.numerics.hessian import gather

CPU = torch.device("cpu")


def batches(exact: list[bool]) -> list[tuple[Tensor, Tensor | None]]:
    g = torch.Generator().manual_seed(1)
    made = [torch.randn(2, 5, 24, generator=g) for _ in exact]
    return [(x, x + 0.1 * torch.randn(x.shape, generator=g) if e else None) for x, e in zip(made, exact, strict=True)]


def moment(left: list[Tensor], right: list[Tensor]) -> Tensor:
    a, b = (torch.cat([x.reshape(-1, 24) for x in side]).double() for side in (left, right))
    return a.T @ b / len(a)


def test_the_hessian_is_the_mean_outer_product() -> None:
    made = batches([False] * 3)
    moments = gather(made, 24, CPU)
    whole = moment([x for x, _ in made], [x for x, _ in made])
    assert torch.allclose(moments.hessian.double(), whole, atol=1e-5)
    assert torch.equal(moments.hessian, moments.hessian.T)
    assert (moments.tokens, moments.drift, moments.halves) == (30, None, None)


@pytest.mark.parametrize("exact", [[True, False, True], [True, True, True]])
def test_drift_is_the_mean_over_the_batches_that_have_an_exact_input(exact: list[bool]) -> None:
    """Drift from part of the text and Hessian from all of it are both means per token."""
    made = batches(exact)
    moments = gather(made, 24, CPU, drifting=True)
    pairs = [(x, was) for x, was in made if was is not None]
    expected = moment([was - x for x, was in pairs], [x for x, _ in pairs])
    assert moments.drift is not None
    assert torch.allclose(moments.drift.double(), expected, atol=1e-5)


def test_two_parts_make_the_whole() -> None:
    made = batches([False] * 4)
    moments = gather(made, 24, CPU, first_held_out=3)
    assert moments.halves is not None
    train, held = moments.halves
    assert torch.allclose((train + held) / moments.tokens, moments.hessian, atol=1e-6)
    last = made[3][0].reshape(-1, 24)
    assert torch.allclose(held, last.T @ last, atol=1e-4)


def test_nothing_gathered_is_no_division_by_zero() -> None:
    moments = gather([], 8, CPU, drifting=True)
    assert moments.tokens == 0
    assert torch.equal(moments.hessian, torch.zeros(8, 8))
