"""`requant.staging`: one place in host memory for one tensor after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pico
import pytest
import torch

from requant import skeleton, staging
from requant.blocks import Walk
from requant.checkpoint import Checkpoint
from requant.staging import Staging

CPU = torch.device("cpu")
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


def test_what_a_checkpoint_reads_there_is_what_it_holds(tmp_path: Path) -> None:
    checkpoint = Checkpoint(pico.save(pico.model(), tmp_path / "model", torch.bfloat16))
    here = Staging()
    for name in checkpoint:
        read = checkpoint.read(name, here.room)
        assert torch.equal(read, checkpoint.read(name))
        assert read.data_ptr() == here.room(1).data_ptr()


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


def test_a_block_is_read_through_one_place(tmp_path: Path) -> None:
    """As the thread does that reads ahead; there each copy is on the GPU before the next is read."""
    checkpoint = Checkpoint(pico.save(pico.model(), tmp_path / "model", torch.float32))
    walk = Walk(checkpoint, skeleton.build(skeleton.load_config(checkpoint.path)), device=CPU, dtype=torch.float32)
    places = set()

    def read(name: str) -> torch.Tensor:
        tensor = walk._read_staged(name)
        places.add(tensor.data_ptr())
        return tensor.clone()

    prefix = f"{walk.prefix}.0."
    widest = max(checkpoint[walk.names[prefix + n]].nbytes for n, _ in walk.blocks[0].named_parameters())
    walk._staging.room(widest)
    staged = walk._read(walk.blocks[0], prefix, read)
    assert len(places) == 1
    for name, tensor in walk._read(walk.blocks[0], prefix).items():
        assert torch.equal(staged[name], tensor)


@GPU
def test_what_a_gpu_has_is_fetched_to_one_place() -> None:
    here = Staging()
    for tensor in (torch.randn(7, 5), torch.arange(12).view(3, 4), torch.randn(9, 9).T[2:], torch.ones(())):
        fetched = here.fetched(tensor.cuda())
        assert fetched.is_pinned()
        assert torch.equal(fetched, tensor)


@GPU
def test_blocks_read_ahead_are_the_checkpoints(tmp_path: Path) -> None:
    checkpoint = Checkpoint(pico.save(pico.model(), tmp_path / "model", torch.bfloat16))
    config = skeleton.load_config(checkpoint.path)
    walk = Walk(checkpoint, skeleton.build(config), device=torch.device("cuda"), dtype=torch.bfloat16)
    for index in range(len(walk)):
        for name, parameter in walk.load(index).named_parameters():
            stored = checkpoint.read(walk.names[f"{walk.prefix}.{index}.{name}"])
            assert torch.equal(parameter.cpu(), stored.bfloat16())
