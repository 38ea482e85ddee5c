"""`requant.hessian`: what is gathered from batches, against one product of all of them in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from requant.hessian import gather

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
    assert (moments.tokens, moments.drift.take(), moments.halves) == (30, None, None)


@pytest.mark.parametrize("exact", [[True, False, True], [True, True, True]])
def test_drift_is_the_mean_over_the_batches_that_have_an_exact_input(exact: list[bool]) -> None:
    """Measured on a part of the text, it still stands beside a Hessian of all of it: both are means a token."""
    made = batches(exact)
    pairs = [(x, was) for x, was in made if was is not None]
    expected = moment([was - x for x, was in pairs], [x for x, _ in pairs])
    drift = gather(made, 24, CPU, drifting=True).drift.take()
    assert drift is not None
    assert torch.allclose(drift.double(), expected, atol=1e-5)


def test_exact_inputs_are_called_for_once_when_the_drift_is_wanted() -> None:
    """Those that are known are summed up as they come, the others in their order; the Hessian does not wait for them."""
    made = batches([True, False, True, True])
    known = gather(made, 24, CPU, drifting=True).drift.take()
    called: list[int] = []

    def later(number: int) -> Tensor:
        called.append(number)
        was = made[number][1]
        assert was is not None
        return was

    mixed = [(x, partial(later, i) if was is not None and i else was) for i, (x, was) in enumerate(made)]
    moments = gather(mixed, 24, CPU, drifting=True)
    assert called == []
    assert torch.equal(moments.hessian, gather(made, 24, CPU).hessian)
    drift = moments.drift.take()
    assert called == [2, 3]
    assert drift is not None
    assert known is not None
    assert torch.equal(drift, known)
    assert (moments.drift.sum, moments.drift.left) == (None, [])


def test_others_add_to_the_hessian_first_and_to_the_drift_when_it_is_taken() -> None:
    made = batches([True, False])
    asked: list[tuple[int, int, list[int]]] = []

    def pool(triangles: Sequence[Tensor], others: Sequence[Tensor], counts: Sequence[int]) -> list[int]:
        """Another rank that has seen the same."""
        asked.append((len(triangles), len(others), list(counts)))
        for tensor in (*triangles, *others):
            tensor.mul_(2)
        return [2 * n for n in counts]

    moments = gather(made, 24, CPU, drifting=True, pool=pool)
    assert asked == [(1, 0, [20, 10])]
    alone = gather(made, 24, CPU, drifting=True)
    assert moments.tokens == 2 * alone.tokens
    assert torch.allclose(moments.hessian, alone.hessian)
    drift, mine = moments.drift.take(), alone.drift.take()
    assert asked[1:] == [(0, 1, [])]
    assert drift is not None
    assert mine is not None
    assert torch.allclose(drift, mine)


def test_two_parts_make_the_whole() -> None:
    made = batches([False] * 4)
    moments = gather(made, 24, CPU, held_from=3)
    assert moments.halves is not None
    train, held = moments.halves
    assert torch.allclose((train + held) / moments.tokens, moments.hessian, atol=1e-6)
    last = made[3][0].reshape(-1, 24)
    assert torch.allclose(held, last.T @ last, atol=1e-4)


def test_nothing_gathered_is_no_division_by_zero() -> None:
    moments = gather([], 8, CPU, drifting=True)
    assert moments.tokens == 0
    assert torch.equal(moments.hessian, torch.zeros(8, 8))
    drift = moments.drift.take()
    assert drift is not None
    assert torch.equal(drift, torch.zeros(8, 8))
