"""`requant.correction` against least squares in fp64."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from requant import correction as correction_module
from requant import gptq
from requant.correction import Correction


@pytest.fixture(autouse=True, params=[False, True])
def by_drift(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(correction_module.BY_DRIFT, "cpu", request.param)


@pytest.mark.parametrize("rows", [(8,), (20, 12), (30,)])  # fewer than the inputs, more in all, more
def test_corrected_weights_are_the_least_squares_answer(rows: tuple[int, ...]) -> None:
    """Without damping: the weights that map the inputs as they are to the outputs as they were."""
    torch.manual_seed(0)
    before = torch.randn(400, 24)
    now = before + 0.1 * torch.randn(400, 24)
    weights = [torch.randn(n, 24) for n in rows]
    drift = (before - now).T @ now
    factor = gptq.factorize(now.T @ now, torch.randperm(24), 0.0)
    correction = Correction(drift, weights)
    for i, weight in enumerate(weights):
        exact = torch.linalg.lstsq(now.double(), (before @ weight.T).double()).solution.T
        ours = correction.moved(i, weight, factor, 1.0)
        assert torch.allclose(ours.double(), exact, atol=1e-4)
        half = Correction(drift, weights).moved(i, weight, factor, 0.5)
        assert torch.allclose(half.double(), (weight + exact) / 2, atol=1e-4)


@pytest.mark.parametrize("rows", [8, 30])
def test_without_drift_factor_or_share_a_weight_stays(rows: int) -> None:
    torch.manual_seed(1)
    weight, hessian = torch.randn(rows, 24), torch.eye(24)
    factor = gptq.factorize(hessian, torch.arange(24), 0.01)
    assert Correction(None, [weight]).moved(0, weight, factor, 1.0) is weight
    drifting = Correction(torch.randn(24, 24), [weight])
    assert drifting.moved(0, weight, replace(factor, diagonal=True), 1.0) is weight
    assert drifting.moved(0, weight, factor, 0.0) is weight
    assert torch.equal(Correction(torch.zeros(24, 24), [weight]).moved(0, weight, factor, 1.0), weight)


@pytest.mark.parametrize("rows", [(8,), (30, 12)])
def test_nothing_large_outlives_the_last_move(rows: tuple[int, ...]) -> None:
    weights = [torch.randn(n, 24) for n in rows]
    drift = torch.randn(24, 24)
    held = weakref.ref(drift)
    correction = Correction(drift, weights)
    del drift
    factor = gptq.factorize(torch.eye(24), torch.arange(24), 0.01)
    for i, weight in enumerate(weights):
        correction.moved(i, weight, factor, 0.5)
    assert held() is None
    assert correction.solved is None
    assert all(p.numel() == 0 for p in correction.pulled)
