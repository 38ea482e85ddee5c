"""`requant.numerics.gptq.damping`: how much is damped."""

from __future__ import annotations

import pytest

from requant.numerics import gptq


@pytest.mark.parametrize(("tokens", "damp"), [(1, 0.05), (16 * 64, 0.05), (64 * 64 - 1, 0.05), (64 * 64, 0.02)])
def test_little_text_is_damped_more(tokens: int, damp: float) -> None:
    """Measured in bench/NOTES.md: at 16 to 42 tokens an input 0.05 loses less on other text than 0.02."""
    assert gptq.damping(None, tokens, 64) == damp
    assert gptq.damping(0.3, tokens, 64) == 0.3
