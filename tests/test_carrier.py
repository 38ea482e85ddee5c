"""`requant.carrier`: tensors that travel in parts arrive whole."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pico
import pytest
import torch
from safetensors.torch import save_file

from requant import carrier as carrier_module
from requant import skeleton
from requant.blocks import Walk
from requant.carrier import Carrier
from requant.checkpoint import Checkpoint
from requant.errors import StageError

CPU = torch.device("cpu")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=GPU)]
PLACE = 1000  # bytes: no number of any dtype below ends there


@pytest.fixture(autouse=True)
def small_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier_module, "PLACE", PLACE)


@pytest.fixture
def stored(tmp_path: Path) -> Checkpoint:
    torch.manual_seed(0)
    tensors = {
        "many": torch.randn(1700, 13), "odd": torch.randn(333).half(), "one": torch.tensor(3.5), "none": torch.empty(0, 4),
        "codes": torch.randint(0, 255, (50, 41), dtype=torch.uint8), "words": torch.randint(-9, 9, (77, 7), dtype=torch.int32),
        "brain": torch.randn(40, 25).bfloat16(),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path)


@pytest.mark.parametrize("device", DEVICES)
def test_what_arrives_is_what_is_stored(stored: Checkpoint, device: torch.device) -> None:
    carrier = Carrier(device)
    for name in stored:
        arrived, wanted = carrier.bring(stored[name]), stored.read(name)
        assert (arrived.dtype, arrived.shape, arrived.device.type) == (wanted.dtype, wanted.shape, device.type)
        assert torch.equal(arrived.cpu(), wanted), name


@pytest.mark.parametrize("device", DEVICES)
def test_several_threads_share_the_places(
    stored: Checkpoint, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more places than there are to be are made, none is used by two at once, and none is lost."""
    made: list[torch.Tensor] = []
    busy: set[int] = set()
    guard = threading.Lock()
    locked, read_part = carrier_module.locked, carrier_module.read_part

    def making(nbytes: int) -> torch.Tensor:
        made.append(locked(nbytes))
        return made[-1]

    def reading(file: Any, info: Any, part: slice, into: torch.Tensor) -> None:
        with guard:
            assert into.data_ptr() not in busy
            busy.add(into.data_ptr())
        read_part(file, info, part, into)
        with guard:
            busy.remove(into.data_ptr())

    monkeypatch.setattr(carrier_module, "locked", making)
    monkeypatch.setattr(carrier_module, "read_part", reading)
    carrier = Carrier(device)
    names = ["many", "codes", "words", "brain"] * 5
    with ThreadPoolExecutor(4) as pool:
        for name, arrived in zip(names, pool.map(lambda n: carrier.bring(stored[n]), names), strict=True):
            assert torch.equal(arrived.cpu(), stored.read(name)), name
    assert 1 <= len(made) <= carrier_module.PLACES
    assert carrier.places.qsize() == carrier_module.PLACES


def test_a_file_that_was_cut_is_named_and_the_next_still_comes(stored: Checkpoint) -> None:
    last = max(stored.values(), key=lambda info: info.offset + info.nbytes)
    carrier = Carrier(CPU)
    with last.file.open("r+b") as file:
        file.truncate(last.offset + last.nbytes - 2)
    for _ in range(2 * carrier_module.PLACES):  # no place is lost
        with pytest.raises(StageError, match=rf"{last.file}.*{last.name}.* ends after"):
            carrier.bring(last)
    other = next(info for info in stored.values() if info.nbytes > PLACE and info.name != last.name)
    assert torch.equal(carrier.bring(other), stored.read(other.name))
    assert carrier.places.qsize() == carrier_module.PLACES


def test_only_a_gpu_has_tensors_brought(tmp_path: Path) -> None:
    """On a CPU they are read where they stay."""
    checkpoint = Checkpoint(pico.save(pico.model(), tmp_path / "model", torch.float32))
    walk = Walk(checkpoint, skeleton.build(skeleton.load_config(checkpoint.path)), device=CPU, dtype=torch.float32)
    assert walk._carrier is None
    walk._carrier = Carrier(CPU)
    brought = walk._read(walk.blocks[0], f"{walk.prefix}.0.")
    walk._carrier = None
    read = walk._read(walk.blocks[0], f"{walk.prefix}.0.")
    assert brought.keys() == read.keys()
    assert all(torch.equal(brought[name], read[name]) for name in read)


@GPU
def test_blocks_read_ahead_are_the_checkpoints(tmp_path: Path) -> None:
    checkpoint = Checkpoint(pico.save(pico.model(), tmp_path / "model", torch.bfloat16))
    config = skeleton.load_config(checkpoint.path)
    walk = Walk(checkpoint, skeleton.build(config), device=torch.device("cuda"), dtype=torch.bfloat16)
    for index in range(len(walk)):
        for name, parameter in walk.load(index).named_parameters():
            stored = checkpoint.read(walk.names[f"{walk.prefix}.{index}.{name}"])
            assert torch.equal(parameter.cpu(), stored.bfloat16())
