"""`requant.staging`: one place in host memory for one tensor after another."""

from __future__ import annotations

from pathlib import Path

import pico
import pytest
import torch

from requant import skeleton, staging
from requant.blocks import Walk
from requant.checkpoint import Checkpoint
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
    config = skeleton.load_config(checkpoint.path, trust_remote_code=False)
    walk = Walk(checkpoint, skeleton.build(config), device=torch.device("cuda"), dtype=torch.bfloat16)
    for index in range(len(walk)):
        for name, parameter in walk.load(index).named_parameters():
            stored = checkpoint.read(walk.names[f"{walk.prefix}.{index}.{name}"])
            assert torch.equal(parameter.cpu(), stored.bfloat16())
