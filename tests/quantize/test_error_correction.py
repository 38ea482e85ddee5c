"""`requant.quantize.error_correction` against least squares in fp64."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from helpers.devices import set_profile

from requant.numerics import cholesky, gptq
from requant.quantize import error_correction as correction_module
from requant.quantize.error_correction import Correction
from requant.runtime.device import PROFILES
from requant.runtime.ranks import Ranks


@pytest.fixture(autouse=True, params=["cpu", "cuda"])
def as_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with the settings of a CPU and of a GPU."""
    profile = PROFILES[request.param]
    set_profile(monkeypatch, corrects_by_drift=profile.corrects_by_drift, blocked_solve=profile.blocked_solve)


class OneOf(Ranks):
    """One of several ranks run one after another; the last one sees what all have given."""

    def __init__(self, rank: int, count: int, given: list[torch.Tensor]) -> None:
        self.rank, self.count, self.given = rank, count, given

    def own_rows(self, whole: torch.Tensor) -> torch.Tensor:
        each = -(-len(whole) // self.count)
        return whole[torch.arange(self.rank * each, (self.rank + 1) * each).clamp_(max=len(whole) - 1)]

    def all_gather_rows(self, part: torch.Tensor, rows: int) -> torch.Tensor:
        self.given.append(part)
        known = torch.cat(self.given)
        return torch.nn.functional.pad(known, (0, 0, 0, max(0, rows - len(known))))[:rows]


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
        ours = correction.corrected(i, weight, factor, 1.0)
        assert torch.allclose(ours.double(), exact, atol=1e-4)
        half = Correction(drift, weights).corrected(i, weight, factor, 0.5)
        assert torch.allclose(half.double(), (weight + exact) / 2, atol=1e-4)


@pytest.mark.parametrize("rows", [8, 30])
def test_without_drift_factor_or_share_a_weight_stays(rows: int) -> None:
    torch.manual_seed(1)
    weight, hessian = torch.randn(rows, 24), torch.eye(24)
    factor = gptq.factorize(hessian, torch.arange(24), 0.01)
    assert Correction(None, [weight]).corrected(0, weight, factor, 1.0) is weight
    drifting = Correction(torch.randn(24, 24), [weight])
    assert drifting.corrected(0, weight, replace(factor, diagonal=True), 1.0) is weight
    assert drifting.corrected(0, weight, factor, 0.0) is weight
    assert torch.equal(Correction(torch.zeros(24, 24), [weight]).corrected(0, weight, factor, 1.0), weight)


@pytest.mark.parametrize("rows", [(8,), (30, 12)])
def test_nothing_large_outlives_the_last_move(rows: tuple[int, ...]) -> None:
    weights = [torch.randn(n, 24) for n in rows]
    drift = torch.randn(24, 24)
    held = weakref.ref(drift)
    correction = Correction(drift, weights)
    del drift
    factor = gptq.factorize(torch.eye(24), torch.arange(24), 0.01)
    for i, weight in enumerate(weights):
        correction.corrected(i, weight, factor, 0.5)
    assert held() is None
    assert correction.solved is None
    assert all(p.numel() == 0 for p in correction.pulled)


@pytest.mark.parametrize("rows", [(30, 12), (20, 12), (8,)])
def test_ranks_solve_for_the_drift_together(rows: tuple[int, ...]) -> None:
    """24 inputs over 5 ranks: 5 columns of the drift each, fewer for the last.

    With few rows each rank solves for its own.
    """
    torch.manual_seed(2)
    x = torch.randn(100, 24)
    factor, drift = gptq.factorize(x.T @ x, torch.randperm(24), 0.01), torch.randn(24, 24)
    whole = [torch.randn(n, 24) for n in rows]
    alone = Correction(drift.clone(), whole)
    wanted = [alone.corrected(i, w, factor, 0.5) for i, w in enumerate(whole)]
    given: list[torch.Tensor] = []
    for rank in range(5):
        ranks = OneOf(rank, 5, given)
        own = [ranks.own_rows(w) for w in whole]
        several = Correction(drift.clone(), own, ranks)
        moved = [several.corrected(i, w, factor, 0.5) for i, w in enumerate(own)]
        if rank == 4 or not given:
            for found, all_rows in zip(moved, wanted, strict=True):
                assert torch.allclose(found, ranks.own_rows(all_rows), atol=1e-4)
    by_drift = PROFILES["cpu"].corrects_by_drift and sum(rows) > 24
    assert [len(part) for part in given] == ([5] * 5 if by_drift else [])


def test_a_gpu_solves_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[int] = []
    solve = cholesky.solve
    monkeypatch.setattr(cholesky, "solve", lambda lower, columns: solved.append(len(lower)) or solve(lower, columns))
    factor = gptq.factorize(torch.eye(8), torch.arange(8), 0.01)
    correction_module._solved(torch.ones(8, 2), factor)
    assert solved == ([8] if PROFILES["cpu"].blocked_solve else [])
