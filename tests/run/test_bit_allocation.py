"""`requant.run.bit_allocation`: the least loss within the budget."""

from __future__ import annotations

import itertools
import random

import pytest

from requant.run import bit_allocation
from requant.run.bit_allocation import allocate

WIDTHS = (2, 3, 4, 8)


def problem(seed: int, count: int = 5, step: int = 1024) -> tuple[list[int], list[dict[int, float]]]:
    """Units of random sizes and losses, which fall with the width."""
    draw = random.Random(seed)
    sizes = [step * draw.randint(1, 9) for _ in range(count)]
    losses = [dict(zip(WIDTHS, sorted((draw.random() for _ in WIDTHS), reverse=True), strict=True)) for _ in sizes]
    return sizes, losses


def total(losses: list[dict[int, float]], bits: tuple[int, ...] | list[int]) -> float:
    return sum(own[width] for own, width in zip(losses, bits, strict=True))


def spent(sizes: list[int], bits: tuple[int, ...] | list[int]) -> int:
    return sum(size * width for size, width in zip(sizes, bits, strict=True))


@pytest.mark.parametrize("budget", [2, 2.1, 2.75, 3, 3.5, 4.3, 8])
def test_nothing_within_the_budget_is_better(budget: float) -> None:
    for seed in range(8):
        sizes, losses = problem(seed)
        found = allocate(sizes, losses, budget)
        assert spent(sizes, found) <= budget * sum(sizes)
        fitting = [c for c in itertools.product(WIDTHS, repeat=5) if spent(sizes, c) <= budget * sum(sizes)]
        assert total(losses, found) == pytest.approx(min(total(losses, c) for c in fitting), rel=1e-12)


def test_a_budget_is_met_to_the_bit() -> None:
    """3.3 is no binary fraction: 10 units, three of them at 4 bits."""
    losses = [{3: 1.0 + i / 10, 4: 0.0} for i in range(10)]
    assert allocate([32] * 10, losses, 3.3) == [3] * 7 + [4] * 3


def test_among_equal_losses_the_fewest_bits() -> None:
    assert allocate([10, 10], [{2: 0.0, 8: 0.0}, {2: 1.0, 8: 1.0}], 8) == [2, 2]


def test_coarse_steps_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes without a common divisor, in more steps than there are: each unit is rounded up."""
    monkeypatch.setattr(bit_allocation, "STEPS", 50)
    for seed in range(8):
        sizes, losses = problem(seed, step=1)
        sizes = [1000 * size + 1 + i for i, size in enumerate(sizes)]
        found = allocate(sizes, losses, 3.5)
        assert spent(sizes, found) <= 3.5 * sum(sizes)
        assert total(losses, found) < total(losses, [2] * 5)


def test_a_budget_below_the_least_width() -> None:
    with pytest.raises(ValueError, match="below the least width, 3"):
        allocate([1], [{3: 1.0, 4: 0.5}], 2.5)
