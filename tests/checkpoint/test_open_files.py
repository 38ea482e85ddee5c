"""Many shards, few open files."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import pytest
import torch

from requant.checkpoint.open_files import MOST, OpenFiles
from requant.checkpoint.reader import Checkpoint
from requant.checkpoint.writer import CheckpointWriter, Slot


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def opened(file: Path) -> FileIO:
    return file.open("r+b", buffering=0)


def made(tmp_path: Path, count: int, most: int) -> tuple[OpenFiles, list[Path]]:
    files = OpenFiles(opened, most)
    paths = [tmp_path / f"{i:03}" for i in range(count)]
    for path in paths:
        files.add(path, path.open("w+b", buffering=0))
    return files, paths


def test_few_are_open_and_all_are_written(tmp_path: Path) -> None:
    before = descriptors()
    files, paths = made(tmp_path, 50, 4)
    assert descriptors() - before == 4

    def write(i: int) -> None:
        for path in paths[i::4]:
            with files.writing(path) as handle:
                os.pwrite(handle.fileno(), b"x" * 10, 10 * i)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert descriptors() - before <= 8
    files.close()
    assert descriptors() == before
    assert [path.stat().st_size for path in paths] == [10 * (i % 4) + 10 for i in range(50)]


def test_every_written_file_is_synced_once_also_closed_ones(tmp_path: Path) -> None:
    files, paths = made(tmp_path, 6, 2)
    synced: list[str] = []
    files.sync(lambda handle: synced.append(Path(str(handle.name)).name))
    assert synced == [p.name for p in paths]
    with files.writing(paths[3]):
        pass
    files.sync(lambda handle: synced.append(Path(str(handle.name)).name))
    assert synced[6:] == ["003"]


def test_what_a_failed_sync_left_is_synced_by_the_next(tmp_path: Path) -> None:
    files, paths = made(tmp_path, 3, 2)

    def full(handle: FileIO) -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        files.sync(full)
    synced: list[str] = []
    files.sync(lambda handle: synced.append(str(handle.name)))
    assert synced == [str(p) for p in paths]


def test_a_checkpoint_of_many_shards_takes_few_descriptors(tmp_path: Path) -> None:
    before = descriptors()
    plan = [Slot(f"t{i:03}", torch.float32, (4,)) for i in range(3 * MOST)]
    with CheckpointWriter(tmp_path, plan, max_bytes=16) as writer:
        for slot in plan:
            writer.write(slot.name, torch.full((4,), float(slot.name[1:])))
        assert descriptors() - before <= MOST + 4
        writer.close()
    written = Checkpoint(tmp_path)
    assert all(written.read(s.name)[0] == float(s.name[1:]) for s in plan)
