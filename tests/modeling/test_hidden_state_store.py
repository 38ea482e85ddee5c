"""`requant.modeling.hidden_state_store`: states return unchanged; NaN is noticed.

On the host too.
"""

from __future__ import annotations

import pytest
import torch

from requant.modeling.hidden_state_store import HiddenStateStore

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_put_comes_back_in_order(device: str, on_host: bool) -> None:
    """Two rounds in the same buffers: no state is overwritten while its copy still runs."""
    shelf = HiddenStateStore(torch.device(device), on_host=on_host)
    values = [torch.randn(3, 64, 32, device=device) for _ in range(5)]
    kept = [shelf.put(v) for v in values]
    for turn in range(2):
        for i, value in enumerate(shelf.take(kept)):
            assert value.device.type == device
            assert torch.equal(value, values[i] + turn)
            kept[i] = shelf.put(value + 1, kept[i])
    assert all(k.device.type == ("cpu" if on_host else device) for k in kept)
    assert shelf.total().isfinite()
    assert list(shelf.take([])) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_number_is_noticed(bad: float) -> None:
    shelf = HiddenStateStore(torch.device("cpu"))
    shelf.put(torch.zeros(4))
    assert shelf.total().isfinite()
    shelf.put(torch.tensor([0.0, bad]))
    shelf.put(torch.zeros(4))
    assert not shelf.total().isfinite()


def test_many_numbers_of_16_bits_are_no_infinity() -> None:
    """NaN is found by a sum, which must not overflow."""
    shelf = HiddenStateStore(torch.device("cpu"))
    for _ in range(3):
        shelf.put(torch.full((7, 10_000), 60_000.0, dtype=torch.float16))
    assert shelf.total().isfinite()
