"""Sharded safetensors, written in place: files are laid out before any tensor arrives.

No tensor is buffered, tensors may be written in any order, and an interrupted writer can resume.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from requant.checkpoint.atomic_write import write_text
from requant.checkpoint.reader import DTYPE_NAMES, INDEX, SINGLE, TensorInfo, read_tensor
from requant.errors import StageError
from requant_eval import strict_json

AT_ONCE = 2**30  # bytes of one write: some systems refuse 2 GB


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor that will be written.

    The plan of a checkpoint is a sequence of these, in any order.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        n = self.dtype.itemsize
        for size in self.shape:
            n *= size
        return n


def plan_shards(plan: Iterable[Slot], max_bytes: int) -> list[list[Slot]]:
    """Split a plan into shards of at most `max_bytes`, keeping the order.

    A larger tensor gets a shard of its own.
    """
    shards: list[list[Slot]] = [[]]
    filled = 0
    for slot in plan:
        if shards[-1] and filled + slot.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(slot)
        filled += slot.nbytes
    return shards


class CheckpointWriter:
    """Writes the tensors of a plan, in any order, each straight to its place in its shard.

    Opening lays the shards out; `resume=True` keeps shards already laid out by the same plan, so that tensors
    written before an interruption need not be written again. `close` refuses to finish while a slot is empty,
    syncs, and writes the index.
    """

    def __init__(
        self, path: str | Path, plan: Iterable[Slot], *, max_bytes: int = 5 * 10**9, resume: bool = False
    ) -> None:
        self.path = Path(path)
        shards = plan_shards(plan, max_bytes)
        count = len(shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        self._slots: dict[str, tuple[Slot, str, int]] = {}
        self._missing: set[str] = set()
        self._files: dict[str, BinaryIO] = {}
        self.total_size = 0
        for file, shard in zip(names, shards, strict=True):
            self._lay_out(file, shard, resume=resume)

    def _lay_out(self, file: str, shard: list[Slot], *, resume: bool) -> None:
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for slot in sorted(shard, key=lambda s: -s.dtype.itemsize):  # wide dtypes first: every tensor stays aligned
            if slot.name in self._slots:
                raise ValueError(f"{slot.name} is planned twice")
            table[slot.name] = {
                "dtype": DTYPE_NAMES[slot.dtype],
                "shape": list(slot.shape),
                "data_offsets": [offset, offset + slot.nbytes],
            }
            self._slots[slot.name] = (slot, file, offset)
            offset += slot.nbytes
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        header = struct.pack("<Q", len(text)) + text
        for slot in shard:
            self._slots[slot.name] = (slot, file, self._slots[slot.name][2] + len(header))
        self._open(self.path / file, header, len(header) + offset, resume=resume)
        self._missing.update(slot.name for slot in shard)
        self.total_size += offset

    def _open(self, file: Path, header: bytes, size: int, *, resume: bool) -> None:
        keep = resume and file.exists() and file.stat().st_size == size
        if keep:
            with file.open("rb") as f:
                keep = f.read(len(header)) == header
        handle = file.open("r+b" if keep else "w+b", buffering=0)
        self._files[file.name] = handle
        if not keep:
            _reserve(handle, size, file)
            _write_at(handle, 0, header)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor in its slot, by any thread.

        Raises StageError on a full disk, ValueError when it is not as planned.
        """
        slot, file, offset = self._slots[name]
        if tensor.dtype != slot.dtype or tuple(tensor.shape) != slot.shape:
            raise ValueError(f"{name}: planned {slot.dtype} {slot.shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        _write_at(self._files[file], offset, data.data)
        self._missing.discard(name)

    def mark_written(self, names: Iterable[str]) -> None:
        """Mark slots that were filled before the interruption (only after `resume=True`)."""
        self._missing.difference_update(names)

    def read(self, name: str) -> torch.Tensor:
        """Read a slot back from its shard."""
        slot, file, offset = self._slots[name]
        return read_tensor(
            TensorInfo(
                name=name, dtype=slot.dtype, shape=slot.shape, file=self.path / file, offset=offset, nbytes=slot.nbytes
            )
        )

    def sync(self) -> None:
        """Wait until everything written so far is on the disk."""
        for handle in self._files.values():
            os.fsync(handle.fileno())

    def close(self) -> None:
        """Finish: every slot must be filled; writes the index when there are several shards."""
        if self._missing:
            sample = ", ".join(sorted(self._missing)[:3])
            raise ValueError(f"{len(self._missing)} planned tensors were never written, e.g. {sample}")
        self.sync()
        self.abandon()
        if len({file for _, file, _ in self._slots.values()}) > 1:
            weight_map = {name: file for name, (_, file, _) in sorted(self._slots.items())}
            index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
            write_text(self.path / INDEX, json.dumps(index, indent=2) + "\n")

    def abandon(self) -> None:
        """Close the files as they are."""
        for handle in self._files.values():
            handle.close()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.abandon()


class Journal:
    """Results of the blocks that are whole on disk: what an interrupted run need not do again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.blocks: list[list[dict[str, Any]]] = strict_json.load(file, constants=True) if file.exists() else []

    def commit(
        self, index: int, writer: CheckpointWriter, writing: Sequence[Future[None]], results: list[dict[str, Any]]
    ) -> None:
        """Add the results of one more block, once all of its tensors are on the disk.

        Raises StageError when one before it has not.
        """
        if index != len(self.blocks):
            raise StageError(f"{self.file}: block {index} cannot follow {len(self.blocks)} blocks: run again")
        for future in writing:
            future.result()
        writer.sync()
        self.blocks.append(results)
        write_text(self.file, json.dumps(self.blocks))


def _reserve(handle: BinaryIO, size: int, file: Path) -> None:
    """Reserve the disk space, so that a full disk is an error before the work, not after it."""
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle.fileno(), 0, size)
        else:
            handle.truncate(size)
    except OSError as error:
        raise StageError(f"{file}: cannot reserve {size / 1e9:.2f} GB ({error.strerror}): free disk space") from error


def _write_at(handle: BinaryIO, offset: int, data: bytes | memoryview) -> None:
    """Write at an offset; other threads may write elsewhere in the file meanwhile."""
    try:
        view = memoryview(data)
        while view:
            done = os.pwrite(handle.fileno(), view[:AT_ONCE], offset)
            view, offset = view[done:], offset + done
    except OSError as error:
        raise StageError(f"{handle.name}: write failed ({error.strerror}): free disk space and run again") from error
