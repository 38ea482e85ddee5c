"""CUDA graphs: results of replays, and what a capture that fails leaves behind."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from requant.runtime.cuda_graph import CudaGraph, captured

CUDA = torch.device("cuda")


@pytest.mark.gpu
def test_a_replay_reads_new_inputs_and_its_own_tensors() -> None:
    total = torch.zeros(4, device=CUDA)

    def add(x: Tensor) -> Tensor:
        total.add_(x)
        return total * 2

    graph = CudaGraph(add, torch.zeros(4, device=CUDA), device=CUDA)
    total.zero_()
    assert [graph(torch.full((4,), value, device=CUDA))[0].item() for value in (1.0, 3.0)] == [2.0, 8.0]


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_a_device_that_works() -> None:
    """Random numbers too: the generator takes part in a capture."""

    def waits(x: Tensor) -> Tensor:
        return x * float(x.sum().item())

    ones = torch.ones(4, device=CUDA)
    assert captured(waits, ones, device=CUDA) is waits
    assert float(waits(ones)[0]) == 4.0
    assert torch.rand(1000, device=CUDA).std() > 0.1
    assert torch.allclose(torch.eye(8, device=CUDA) @ torch.ones(8, device=CUDA), torch.ones(8, device=CUDA))
    graph = CudaGraph(lambda x: x + 1, ones, device=CUDA)
    assert float(graph(ones)[0]) == 2.0


def test_a_warm_up_that_fails_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels may still write to tensors that the caller frees, and that the next ones would get."""
    waits: list[str] = []

    def stream(name: str) -> Any:
        return SimpleNamespace(name=name, wait_stream=lambda other: waits.append(f"{name} for {other.name}"))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream("current"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())

    def refuses() -> None:
        raise ValueError("the model counts the tokens of its cache")

    with pytest.raises(ValueError, match="counts"):
        CudaGraph(refuses, device=CUDA)
    assert waits == ["side for current", "current for side"]
