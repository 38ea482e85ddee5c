"""Sharded safetensors, written in place: files are laid out before any tensor arrives.

No tensor is buffered, tensors may be written in any order, and an interrupted writer can resume.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open

from requant.checkpoint.atomic_write import atomic_write, write_text, writing
from requant.checkpoint.digests import DIGESTS
from requant.checkpoint.open_files import OpenFiles
from requant.checkpoint.reader import DTYPE_NAMES, INDEX, SINGLE, TensorInfo, read_tensor
from requant.runtime.pinned_memory import parts_on_host
from requant_eval import whole_files
from requant_eval.regular_files import require_regular

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
    written before an interruption need not be written again (`kept` says whether all of them were). The digest of a
    shard is computed in the background once its last slot is filled. `close` refuses to finish while a slot is empty,
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
        self._missing: dict[str, set[str]] = {}  # by shard
        self.kept = resume
        self._files = OpenFiles(whole_files.open_in_place)
        self.total_size = 0
        for file, shard in zip(names, shards, strict=True):
            self._lay_out(file, shard, resume=resume)

    def _lay_out(self, file: str, shard: list[Slot], *, resume: bool) -> None:
        header, offsets, size = _header(shard, {"format": "pt"})
        for slot in shard:
            if slot.name in self._slots:
                raise ValueError(f"{slot.name} is planned twice")
            self._slots[slot.name] = (slot, file, len(header) + offsets[slot.name])
        self._missing[file] = {slot.name for slot in shard}
        self._open(self.path / file, header, len(header) + size, resume=resume)
        self.total_size += size

    def _open(self, file: Path, header: bytes, size: int, *, resume: bool) -> None:
        handle = _laid_out(file, header, size) if resume else None
        self.kept = self.kept and handle is not None
        if handle is None:
            with writing(file, size):
                handle = whole_files.create(file)
            try:
                _reserve(handle, size, file)
                _write_at(handle, 0, header)
            except BaseException:
                handle.close()
                raise
        self._files.add(file, handle)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor in its slot, by any thread.

        Raises StageError on a full disk, ValueError when it is not as planned.
        """
        slot, file, offset = self._slots[name]
        if tensor.dtype != slot.dtype or tuple(tensor.shape) != slot.shape:
            raise ValueError(f"{name}: planned {slot.dtype} {slot.shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        with writing(self.path / file, slot.nbytes), self._files.writing(self.path / file) as handle:
            for part in parts_on_host(tensor):
                _write_at(handle, offset, part.numpy().data)
                offset += len(part)
        self._filled(file, {name})

    def mark_written(self, names: Iterable[str]) -> None:
        """Mark slots that were filled before the interruption (only after `resume=True`)."""
        for name in names:
            self._filled(self._slots[name][1], {name})

    def _filled(self, file: str, names: set[str]) -> None:
        missing = self._missing[file]
        missing -= names
        if not missing:
            DIGESTS.ahead(self.path / file)

    def read(self, name: str) -> torch.Tensor:
        """Read a slot back from its shard."""
        slot, file, offset = self._slots[name]
        return read_tensor(
            TensorInfo(
                name=name, dtype=slot.dtype, shape=slot.shape, file=self.path / file, offset=offset, nbytes=slot.nbytes
            )
        )

    def checksum(self, names: Iterable[str]) -> str:
        """The sha256 of what these slots hold, read back one by one."""
        digest = hashlib.sha256()
        for name in names:
            digest.update(name.encode())
            digest.update(_raw(self.read(name)))
        return digest.hexdigest()

    def sync(self) -> None:
        """Wait until everything written so far is on the disk."""
        self._files.sync(_sync)

    def close(self) -> None:
        """Finish: every slot must be filled; writes the index when there are several shards."""
        missing = sorted(name for names in self._missing.values() for name in names)
        if missing:
            sample = ", ".join(missing[:3])
            raise ValueError(f"{len(missing)} planned tensors were never written, e.g. {sample}")
        self.sync()
        self.abandon()
        if len({file for _, file, _ in self._slots.values()}) > 1:
            weight_map = {name: file for name, (_, file, _) in sorted(self._slots.items())}
            index = {"metadata": {"total_size": self.total_size}, "weight_map": weight_map}
            write_text(self.path / INDEX, json.dumps(index, indent=2) + "\n")

    def abandon(self) -> None:
        """Close the files as they are."""
        self._files.close()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.abandon()


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a small safetensors file at once, on the disk; tensor after tensor, without a copy of all.

    Its metadata holds a checksum of everything else. Raises StageError when it cannot be written.
    """
    metadata = {**metadata, "checksum": _checksum(tensors, metadata)}
    header, size = _header([Slot(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()], metadata)[::2]
    with atomic_write(file, len(header) + size) as handle:
        handle.write(header)
        for name in sorted(tensors, key=lambda n: -tensors[n].dtype.itemsize):
            handle.write(_raw(tensors[name]))


def load_tensors(file: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors that `save_tensors` wrote; ValueError where they were changed since."""
    require_regular(file)
    with safe_open(file, framework="pt") as stored:
        metadata = dict(stored.metadata() or {})
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    if metadata.pop("checksum", None) != _checksum(tensors, metadata):
        raise ValueError("its bytes have changed")
    return metadata, tensors


def load_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor that `save_tensors` wrote; its bytes are not proved."""
    require_regular(file)
    with safe_open(file, framework="pt") as stored:
        return stored.get_tensor(name)  # type: ignore[no-any-return]


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    names = sorted(tensors)
    shapes = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in names]
    digest = hashlib.sha256(json.dumps([sorted(metadata.items()), shapes]).encode())
    for name in names:
        digest.update(_raw(tensors[name]))
    return digest.hexdigest()


def overwrite(file: Path, offset: int, tensor: torch.Tensor) -> None:
    """Change a tensor's bytes in a file that exists; raises StageError when that fails."""
    data = _raw(tensor)
    with writing(file, len(data)), whole_files.open_in_place(file) as handle:
        _write_at(handle, offset, data)


def _header(shard: Sequence[Slot], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """(header, name -> offset in the data, bytes of the data) of a safetensors file."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets, end = {}, 0
    for slot in sorted(shard, key=lambda s: -s.dtype.itemsize):  # wide dtypes first: every tensor stays aligned
        table[slot.name] = {
            "dtype": DTYPE_NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [end, end + slot.nbytes],
        }
        offsets[slot.name] = end
        end += slot.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets, end


def _raw(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes, row-major."""
    view: memoryview = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return view


def _laid_out(file: Path, header: bytes, size: int) -> FileIO | None:
    """The shard of an interrupted run, open; None where it is missing, of another plan, or no file of its own."""
    try:
        handle = whole_files.open_in_place(file)
    except OSError:
        return None
    if os.fstat(handle.fileno()).st_size == size and os.pread(handle.fileno(), len(header), 0) == header:
        return handle
    handle.close()
    return None


def _sync(handle: FileIO) -> None:
    with writing(Path(str(handle.name))):
        whole_files.sync(handle)


def _reserve(handle: FileIO, size: int, file: Path) -> None:
    """Reserve the disk space, so that a full disk is an error before the work, not after it."""
    with writing(file, size):
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle.fileno(), 0, size)
        else:
            handle.truncate(size)


def _write_at(handle: FileIO, offset: int, data: bytes | memoryview) -> None:
    """Write at an offset; other threads may write elsewhere in the file meanwhile."""
    view = memoryview(data)
    with writing(Path(str(handle.name)), len(view)):
        while view:
            done = os.pwrite(handle.fileno(), view[:AT_ONCE], offset)
            view, offset = view[done:], offset + done
