"""`requant.runtime.pinned_memory`: one place in host memory for one tensor after another."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from requant.runtime import pinned_memory
from requant.runtime.pinned_memory import PinnedBuffer, copy_to_host_async, parts_on_host

GPU = pytest.mark.gpu
TWO = pytest.mark.gpu(count=2)


def test_the_place_grows_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned_memory, "LARGEST", 128)
    here = PinnedBuffer()
    first = here.of_size(64)
    assert (first.dtype, len(first)) == (torch.uint8, 64)
    assert here.of_size(10).data_ptr() == first.data_ptr()
    grown = here.of_size(100)
    assert len(grown) == 100
    assert here.of_size(64).data_ptr() == here.of_size(100).data_ptr() == grown.data_ptr()
    beyond = here.of_size(129)
    assert len(beyond) == 129
    assert here.of_size(128).data_ptr() not in (beyond.data_ptr(), grown.data_ptr())


def test_a_tensor_of_the_cpu_is_fetched_as_it_is() -> None:
    tensor = torch.arange(5)
    assert PinnedBuffer().to_host(tensor) is tensor


def test_memory_that_cannot_be_locked_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def refusing(*args: Any, pin_memory: bool = False, **named: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("cannot lock so much")
        return empty(*args, **named)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", refusing)
    assert len(PinnedBuffer().of_size(64)) == 64


@GPU
def test_what_a_gpu_has_is_fetched_to_one_place() -> None:
    here = PinnedBuffer()
    for tensor in (torch.randn(7, 5), torch.arange(12).view(3, 4), torch.randn(9, 9).T[2:], torch.ones(())):
        fetched = here.to_host(tensor.cuda())
        assert fetched.is_pinned()
        assert torch.equal(fetched, tensor)


def test_what_is_sent_from_a_cpu_is_there() -> None:
    tensor = torch.arange(5)
    assert copy_to_host_async(tensor)() is tensor


@GPU
def test_what_is_sent_is_as_it_was_then() -> None:
    tensor = torch.arange(5, device="cuda")
    there = [copy_to_host_async(tensor.add_(1)) for _ in range(3)]
    torch.cuda._sleep(10**8)
    tensor.zero_()
    assert [t().tolist() for t in there] == [[i + n for i in range(5)] for n in (1, 2, 3)]


OTHER = """
import threading, torch
from requant.runtime.pinned_memory import use_stream
torch.cuda.set_device(1)
stream = torch.cuda.Stream("cuda:1")
def work():
    with use_stream(stream):
        print(torch.ones(3, device="cuda:1").sum().item())
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(torch._C._cuda_hasPrimaryContext(0), torch._C._cuda_hasPrimaryContext(1))
"""


@TWO
def test_a_threads_stream_begins_no_other_gpu() -> None:
    done = subprocess.run([sys.executable, "-c", OTHER], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["3.0", "False", "True"]


DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=GPU)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", [7, 64, 4096])
def test_the_parts_of_a_tensor_are_its_bytes(device: torch.device, part: int) -> None:
    """Transposed, in 16 bit, empty, and longer than two parts, which share two buffers."""
    tensors = [torch.arange(700).reshape(20, 35).T, torch.randn(33).bfloat16(), torch.empty(0, 3), torch.tensor(True)]
    for tensor in tensors:
        parts = [bytes(p.numpy()) for p in parts_on_host(tensor.to(device), part)]
        assert b"".join(parts) == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_a_tensor_of_the_cpu_is_one_part_without_a_copy() -> None:
    tensor = torch.arange(100)
    (part,) = parts_on_host(tensor, 8)
    assert part.data_ptr() == tensor.data_ptr()
