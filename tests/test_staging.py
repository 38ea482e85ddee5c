"""`requant.staging`: one place in host memory for one tensor after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from requant import staging
from requant.staging import Staging

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_the_place_grows_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "LARGEST", 128)
    here = Staging()
    first = here.room(64)
    assert (first.dtype, len(first)) == (torch.uint8, 64)
    assert here.room(10).data_ptr() == first.data_ptr()
    grown = here.room(100)
    assert len(grown) == 100
    assert here.room(64).data_ptr() == here.room(100).data_ptr() == grown.data_ptr()
    beyond = here.room(129)
    assert len(beyond) == 129
    assert here.room(128).data_ptr() not in (beyond.data_ptr(), grown.data_ptr())


def test_a_tensor_of_the_cpu_is_fetched_as_it_is() -> None:
    tensor = torch.arange(5)
    assert Staging().fetched(tensor) is tensor


def test_memory_that_cannot_be_locked_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def refusing(*args: Any, pin_memory: bool = False, **named: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("cannot lock so much")
        return empty(*args, **named)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", refusing)
    assert len(Staging().room(64)) == 64


@GPU
def test_what_a_gpu_has_is_fetched_to_one_place() -> None:
    here = Staging()
    for tensor in (torch.randn(7, 5), torch.arange(12).view(3, 4), torch.randn(9, 9).T[2:], torch.ones(())):
        fetched = here.fetched(tensor.cuda())
        assert fetched.is_pinned()
        assert torch.equal(fetched, tensor)
