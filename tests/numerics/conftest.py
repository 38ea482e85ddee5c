"""Fixtures of the kernels: used, or their torch reference functions."""

from __future__ import annotations

import pytest

from requant.numerics import triton_kernels


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Switches `triton_kernels.usable` on and off."""
    switch = [True]
    monkeypatch.setattr(triton_kernels, "usable", lambda _: switch[0])
    return switch
