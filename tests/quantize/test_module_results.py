"""`requant.quantize.module_results`: losses read together are those of each solution."""

from __future__ import annotations

import weakref

import pytest
import torch
from helpers.gptq_problems import problem, solved

from requant.numerics.delta_retention import Delta, delta_retention, measure
from requant.numerics.grid import Grid
from requant.numerics.solution import Solution
from requant.quantize.module_results import BlockResults


def solution(seed: int) -> tuple[Solution, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    weight, hessian = problem(rows=6 + seed, columns=64)
    return solved(weight, hessian, Grid(4, 32), "activation"), weight, hessian


def test_numbers_come_back_to_whom_they_belong() -> None:
    costs, expected = BlockResults(), []
    for seed, name in enumerate(("a", "b", "c")):
        made, weight, hessian = solution(seed)
        delta = Delta(torch.randn(len(weight), 2), torch.randn(2, 64)) if name != "b" else None
        error = made.weight() - weight
        distance = error.norm() / weight.norm()
        costs.add(name, made, distance, None if delta is None else measure(delta, error, hessian))
        losses = made.losses()
        alone = None if delta is None else delta_retention(delta, error, hessian, losses.loss)
        expected.append((name, losses, alone, int(made.checksum()), float(distance)))
    costs.send(torch.tensor(1.0))
    assert costs.finite()
    results = costs.results(lambda n: 0.5 if n == "c" else 0.0)
    for got, (name, losses, alone, checksum, distance) in zip(results, expected, strict=True):
        assert (got.name, got.loss, got.relative_error, got.rtn_error) == (
            name, losses.loss, losses.relative, losses.rtn_relative,
        )  # fmt: skip
        assert (got.checksum, got.distance) == (checksum, pytest.approx(distance))
        assert got.added == (0.5 if name == "c" else 0.0)
        assert got.signal_to_noise == (None if alone is None else pytest.approx(alone.signal_to_noise))
        assert got.output_retention == (None if alone is None else pytest.approx(alone.output_retention))


@pytest.mark.parametrize("total", [float("nan"), float("inf"), -float("inf")])
def test_an_output_that_is_not_finite_shows(total: float) -> None:
    costs = BlockResults()
    costs.send(torch.tensor(total))
    assert not costs.finite()
    assert costs.results(lambda _: 0.0) == []


def test_no_tensor_of_a_solution_stays_in_memory() -> None:
    costs = BlockResults()
    made = solution(0)[0]
    held = [weakref.ref(t) for t in (made.codes, made.scales.scale, made.errors, made.rounded)]
    costs.add("a", made, torch.tensor(0.1), None)
    del made
    assert [h() for h in held] == [None] * 4


def test_nothing_is_read_before_it_was_sent() -> None:
    with pytest.raises(RuntimeError, match="before they were sent"):
        BlockResults().finite()
