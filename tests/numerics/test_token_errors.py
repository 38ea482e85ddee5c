"""The relative error of hidden states: each token counts alike, whatever its length."""

from __future__ import annotations

import pytest
import torch

from requant.numerics.token_errors import relative_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_token_has_the_same_weight(dtype: torch.dtype) -> None:
    target = torch.tensor([[[3.0, 4.0], [3000.0, 4000.0]]], dtype=dtype)
    output = target * torch.tensor([1.5, 1.0], dtype=dtype)[:, None]  # the first token is off by half its length
    found = relative_error(output, target)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.tolist() == pytest.approx([0.125])


def test_a_token_of_zeros_is_no_division_by_zero() -> None:
    assert torch.isfinite(relative_error(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))).all()
