"""`requant.numerics.finite` against `torch.isfinite`, wherever the value lies."""

from __future__ import annotations

import pytest
import torch

from requant.numerics.finite import all_finite, count_not_finite

KINDS = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)


@KINDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("size", [1, 7, 64, 1000, 40_000])
def test_one_bad_value_is_seen_anywhere(dtype: torch.dtype, bad: float, size: int) -> None:
    """Also in the tail of a vector, and between threads' parts."""
    for place in {0, size // 2, size - 1, size * 2 // 3}:
        values = torch.linspace(-2, 2, size).to(dtype)
        assert all_finite(values)
        values[place] = bad
        assert not all_finite(values)
        assert count_not_finite(values) == 1 == int((~torch.isfinite(values)).sum())


@KINDS
def test_the_largest_numbers_are_finite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = torch.tensor([[largest, -largest], [0.0, torch.finfo(dtype).tiny]], dtype=dtype)
    assert all_finite(values.T)
    assert count_not_finite(values) == 0


def test_several_are_counted() -> None:
    values = torch.zeros(3, 5)
    values[:, 1] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    assert count_not_finite(values[:, ::2]) == 0
    assert count_not_finite(values) == 3


@pytest.mark.parametrize("values", [torch.zeros(0), torch.zeros(0, 4, dtype=torch.float16), torch.arange(5)])
def test_nothing_and_integers_are_finite(values: torch.Tensor) -> None:
    assert all_finite(values)
    assert count_not_finite(values) == 0
