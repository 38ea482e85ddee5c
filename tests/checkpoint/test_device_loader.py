"""`requant.checkpoint.device_loader`: tensors that travel in parts arrive whole."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import pico
from safetensors.torch import save_file

from requant.checkpoint import device_loader, reader
from requant.checkpoint.device_loader import DeviceLoader, load_onto, load_tensor
from requant.checkpoint.reader import Checkpoint
from requant.errors import StageError
from requant.modeling import skeleton
from requant.modeling.block_walk import Walk
from requant.runtime import pinned_memory

CPU = torch.device("cpu")
GPU = pytest.mark.gpu
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=GPU)]
PLACE = 1000  # bytes


@pytest.fixture(autouse=True)
def small_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_loader, "BUFFER_BYTES", PLACE)


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
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_tensors_are_loaded_onto_a_device_as_they_are_read(
    stored: Checkpoint, device: torch.device, dtype: torch.dtype | None
) -> None:
    for name in stored:
        expected = stored.read(name).to(dtype=dtype)
        for loaded in (load_onto(stored, name, device, dtype), load_tensor(stored[name], device, dtype)):
            assert (loaded.dtype, loaded.device.type) == (expected.dtype, device.type)
            assert torch.equal(loaded.cpu(), expected), name


@pytest.mark.parametrize(("device", "index"), [("cuda:0", 0), ("cuda:1", 1), ("cuda", 1)])
def test_a_tensor_goes_to_the_device_that_is_named(
    stored: Checkpoint, device: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also to the first one while another is the current one."""

    class Loader:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def load(self, info: reader.TensorInfo, dtype: torch.dtype) -> torch.device:
            return self.device

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(device_loader, "_loader_of", Loader)
    assert load_onto(stored, "odd", torch.device(device)) == torch.device("cuda", index)


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_no_run_of_bytes_is_read_as_its_checkpoint_reads_it(stored: Checkpoint, device: torch.device) -> None:
    """A decoded or selected tensor: its header says less than how it is read."""

    class Doubled(Checkpoint):
        def contiguous(self, name: str) -> bool:
            return False

        def read(self, name: str) -> torch.Tensor:
            return super().read(name) * 2

    doubled = Doubled(stored.path)
    assert torch.equal(load_onto(doubled, "odd", device).cpu(), stored.read("odd") * 2)


@pytest.mark.parametrize("device", DEVICES)
def test_what_arrives_is_what_is_stored(stored: Checkpoint, device: torch.device) -> None:
    loader = DeviceLoader(device)
    for name in stored:
        arrived, wanted = loader.load(stored[name], stored[name].dtype), stored.read(name)
        assert (arrived.dtype, arrived.shape, arrived.device.type) == (wanted.dtype, wanted.shape, device.type)
        assert torch.equal(arrived.cpu(), wanted), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_arrives_in_the_dtype_that_is_wanted(stored: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
    loader = DeviceLoader(device)
    for name in stored:
        assert torch.equal(loader.load(stored[name], dtype).cpu(), stored.read(name).to(dtype)), name


@pytest.mark.parametrize("device", DEVICES)
def test_several_threads_share_the_places(
    stored: Checkpoint, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads never allocate more buffers than allowed, share one or lose one."""
    made: list[torch.Tensor] = []
    busy: set[int] = set()
    guard = threading.Lock()
    locked, read_part = pinned_memory.allocate_pinned, reader.read_part

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

    monkeypatch.setattr(device_loader, "allocate_pinned", making)
    monkeypatch.setattr(device_loader, "read_part", reading)
    loader = DeviceLoader(device)
    names = ["many", "codes", "words", "brain"] * 5
    with ThreadPoolExecutor(4) as pool:
        for name, arrived in zip(
            names, pool.map(lambda n: loader.load(stored[n], stored[n].dtype), names), strict=True
        ):
            assert torch.equal(arrived.cpu(), stored.read(name)), name
    assert 1 <= len(made) <= device_loader.BUFFERS
    assert loader.buffers.qsize() == device_loader.BUFFERS


def test_a_file_that_was_cut_is_named_and_the_next_still_comes(stored: Checkpoint) -> None:
    last = max(stored.values(), key=lambda info: info.offset + info.nbytes)
    loader = DeviceLoader(CPU)
    with last.file.open("r+b") as file:
        file.truncate(last.offset + last.nbytes - 2)
    for _ in range(2 * device_loader.BUFFERS):  # no place is lost
        with pytest.raises(StageError, match=rf"{last.file}.*{last.name}.* ends after"):
            loader.load(last, last.dtype)
    other = next(info for info in stored.values() if info.nbytes > PLACE and info.name != last.name)
    assert torch.equal(loader.load(other, other.dtype), stored.read(other.name))
    assert loader.buffers.qsize() == device_loader.BUFFERS


def test_a_file_that_is_gone_is_named(stored: Checkpoint) -> None:
    info = stored["many"]
    info.file.unlink()
    for read in (lambda: DeviceLoader(CPU).load(info, info.dtype), lambda: stored.read("many")):
        with pytest.raises(StageError, match=rf"{info.file}: 'many' cannot be read \(No such file"):
            read()


def test_no_place_is_free_while_somebody_writes_to_it(stored: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first part fails at once, others are still being read."""
    under_way: list[int] = []

    def reading(_file: Any, _info: Any, part: slice, _into: torch.Tensor) -> None:
        if not part.start:
            raise StageError("the first part")
        under_way.append(part.start)
        time.sleep(0.2)
        under_way.remove(part.start)

    monkeypatch.setattr(device_loader, "read_part", reading)
    loader = DeviceLoader(CPU)
    with pytest.raises(StageError, match="the first part"):
        loader.load(stored["many"], torch.float32)
    assert under_way == []
    assert loader.buffers.qsize() == device_loader.BUFFERS


def test_a_place_is_free_once_its_part_has_arrived() -> None:
    places: SimpleQueue[torch.Tensor | None] = SimpleQueue()
    transfer = device_loader._Transfer(places, torch.empty(0), torch.float32)
    free: list[bool] = []
    place = torch.empty(1)
    transfer.in_flight.append((SimpleNamespace(synchronize=lambda: free.append(not places.empty())), place))
    transfer.clear()
    assert free == [False]
    assert places.get_nowait() is place


def test_memory_that_is_not_to_be_had_costs_no_place(stored: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: int) -> torch.Tensor:
        raise MemoryError

    loader = DeviceLoader(CPU)
    with monkeypatch.context() as patch:
        patch.setattr(device_loader, "allocate_pinned", none)
        for _ in range(2 * device_loader.BUFFERS):
            with pytest.raises(MemoryError):
                loader.load(stored["many"], torch.float32)
    assert loader.buffers.qsize() == device_loader.BUFFERS
    assert torch.equal(loader.load(stored["many"], torch.float32), stored.read("many"))


def test_a_system_that_reads_less_than_asked_is_asked_again(
    stored: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {name: stored.read(name) for name in stored}
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: preadv(file, [views[0][:7]], at))
    for name in ("odd", "codes"):
        assert torch.equal(stored.read(name), whole[name])
        assert torch.equal(DeviceLoader(CPU).load(stored[name], whole[name].dtype), whole[name])


def test_only_a_gpu_needs_a_loader(stored: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU tensors are read to their final place."""
    monkeypatch.setattr(device_loader, "_loader_of", None)
    assert torch.equal(load_onto(stored, "many", CPU), stored.read("many"))


def test_what_is_made_while_it_is_read_is_not_brought(tmp_path: Path) -> None:
    """Computed weights have no place in a file to load from."""

    class Doubled:
        def __init__(self, stored: Checkpoint) -> None:
            self.stored, self.path = stored, stored.path

        def __iter__(self) -> Iterator[str]:
            return iter(self.stored)

        def __contains__(self, name: object) -> bool:
            return name in self.stored

        def read(self, name: str) -> torch.Tensor:
            return 2 * self.stored.read(name)

    checkpoint = Checkpoint(pico.save(pico.model(), tmp_path / "model", torch.float16))
    model = skeleton.open_model(checkpoint.path)
    walk = Walk(Doubled(checkpoint), model, device=CPU, dtype=torch.float32)
    prefix = f"{walk.prefix}.0."
    for name, tensor in walk._read(walk.blocks[0], prefix).items():
        assert torch.equal(tensor, 2 * checkpoint.read(walk.names[prefix + name]).float())


@GPU
def test_blocks_read_ahead_are_the_checkpoints(tmp_path: Path) -> None:
    checkpoint = Checkpoint(pico.save(pico.model(), tmp_path / "model", torch.bfloat16))
    walk = Walk(checkpoint, skeleton.open_model(checkpoint.path), device=torch.device("cuda"), dtype=torch.bfloat16)
    for index in range(len(walk)):
        for name, parameter in walk.load(index).named_parameters():
            stored = checkpoint.read(walk.names[f"{walk.prefix}.{index}.{name}"])
            assert torch.equal(parameter.cpu(), stored.bfloat16())
