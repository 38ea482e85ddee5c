"""A directory of safetensors: read tensor by tensor, written in place, whole or absent.

Reading goes through the headers only until a tensor is asked for, and then reads exactly that tensor's
bytes (no mmap: the resident set stays one tensor). Writing lays out every shard from a plan of names,
dtypes and shapes before the first tensor arrives, so no tensor waits in a buffer and an interrupted
writer can go on where it stopped. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from requant.errors import InputError, StageError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100 * 2**20

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {v: k for k, v in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `offset` counts from the start of `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensor table of one safetensors file; raises InputError when the file is missing, cut or corrupt."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            head = f.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else MAX_HEADER + 1
            if length > min(MAX_HEADER, size):
                raise InputError(f"{file}: not a safetensors file, or truncated ({size} bytes): download it again")
            table = json.loads(f.read(length))
    except FileNotFoundError:
        raise InputError(f"{file}: missing; the checkpoint is incomplete: download it again") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: corrupt safetensors header ({error}): download the file again") from error
    table.pop("__metadata__", None)
    infos = {name: _info(file, name, entry, 8 + length) for name, entry in table.items()}
    end = max((i.offset + i.nbytes for i in infos.values()), default=8 + length)
    if end > size:
        raise InputError(f"{file}: truncated: {size} bytes, its header describes {end}; download it again")
    return infos


def _info(file: Path, name: str, entry: Mapping[str, Any], base: int) -> TensorInfo:
    try:
        dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: tensor {name!r} has an unreadable header entry {entry!r}") from error
    nbytes = dtype.itemsize
    for n in shape:
        nbytes *= n
    if end - begin != nbytes:
        raise InputError(f"{file}: tensor {name!r} spans {end - begin} bytes, its shape {shape} needs {nbytes}")
    return TensorInfo(name, dtype, shape, file, base + begin, nbytes)


class Checkpoint(Mapping[str, TensorInfo]):
    """A model directory: name -> TensorInfo for every tensor, `read` for the values, `config` for config.json.

    Raises InputError when there are no safetensors (pickles are never loaded), a shard is missing or cut, or
    the index names a tensor that its shard does not hold.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise InputError(f"{path}: no such model directory")
        self._infos = _tables(path)

    def __getitem__(self, name: str) -> TensorInfo:
        try:
            return self._infos[name]
        except KeyError:
            raise KeyError(f"{self.path}: no tensor {name!r}") from None

    def __iter__(self) -> Any:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def config(self) -> dict[str, Any]:
        """config.json as raw JSON."""
        return read_json(self.path / "config.json")

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, freshly allocated on the CPU, in the dtype and shape of the file."""
        return read_tensor(self[name])


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """Read the bytes of one tensor; raises StageError when the file changed or cannot be read."""
    flat = torch.empty(info.nbytes, dtype=torch.uint8)
    if info.nbytes:
        with info.file.open("rb", buffering=0) as f:
            f.seek(info.offset)
            view, got = memoryview(flat.numpy()), 0
            while got < info.nbytes:
                n = f.readinto(view[got:])
                if not n:
                    raise StageError(f"{info.file}: {info.name!r} ends after {got} of {info.nbytes} bytes")
                got += n
    return flat.view(info.dtype).reshape(info.shape)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from `file`; raises InputError when missing, not JSON or not an object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: missing") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _tables(path: Path) -> dict[str, TensorInfo]:
    index = path / INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise InputError(f"{index}: no weight_map")
        headers = {file: read_header(path / file) for file in sorted(set(weight_map.values()))}
        lost = [name for name, file in weight_map.items() if name not in headers[file]]
        if lost:
            raise InputError(f"{index}: {len(lost)} tensors are not in the shards it names, e.g. {lost[0]!r}")
        return {name: headers[file][name] for name, file in weight_map.items()}
    files = sorted(path.glob("*.safetensors"))
    if (path / SINGLE).exists():
        return read_header(path / SINGLE)
    if len(files) == 1:
        return read_header(files[0])
    if files:
        raise InputError(f"{path}: {len(files)} safetensors files but no {INDEX}: download the whole repository")
    pickles = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickles:
        raise InputError(
            f"{path}: only pickled weights ({pickles[0].name}); requant never loads pickles. "
            "Convert them to safetensors first (transformers: save_pretrained)"
        )
    raise InputError(f"{path}: no safetensors weights found")


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor that will be written: the plan of a checkpoint is a sequence of these, in any order."""

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
    """Split a plan into shards of at most `max_bytes` (a larger tensor gets one of its own), keeping the order."""
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

    def __init__(self, path: Path, plan: Iterable[Slot], *, max_bytes: int = 5 * 10**9, resume: bool = False) -> None:
        self.path = path
        shards = plan_shards(plan, max_bytes)
        count = len(shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        self._slots: dict[str, tuple[Slot, str, int]] = {}
        self._missing: set[str] = set()
        self._files: dict[str, BinaryIO] = {}
        self.total_size = 0
        for file, shard in zip(names, shards, strict=True):
            self._lay_out(file, shard, resume)

    def _lay_out(self, file: str, shard: list[Slot], resume: bool) -> None:
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
        self._open(self.path / file, header, len(header) + offset, resume)
        self._missing.update(slot.name for slot in shard)
        self.total_size += offset

    def _open(self, file: Path, header: bytes, size: int, resume: bool) -> None:
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
        """Put one tensor in its slot; raises StageError on a full disk, ValueError when it is not as planned."""
        slot, file, offset = self._slots[name]
        if tensor.dtype != slot.dtype or tuple(tensor.shape) != slot.shape:
            raise ValueError(f"{name}: planned {slot.dtype} {slot.shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        _write_at(self._files[file], offset, memoryview(data))
        self._missing.discard(name)

    def mark_written(self, names: Iterable[str]) -> None:
        """Say that these slots were filled before the interruption (only after `resume=True`)."""
        self._missing.difference_update(names)

    def read(self, name: str) -> torch.Tensor:
        """Read a slot back from its shard."""
        slot, file, offset = self._slots[name]
        return read_tensor(TensorInfo(name, slot.dtype, slot.shape, self.path / file, offset, slot.nbytes))

    def sync(self) -> None:
        """Bring everything written so far to the disk."""
        for handle in self._files.values():
            os.fsync(handle.fileno())

    def close(self) -> None:
        """Finish: every slot must be filled; writes the index when there are several shards."""
        if self._missing:
            sample = ", ".join(sorted(self._missing)[:3])
            raise ValueError(f"{len(self._missing)} planned tensors were never written, e.g. {sample}")
        self.sync()
        self.abandon()
        if len(set(file for _, file, _ in self._slots.values())) > 1:
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


def _reserve(handle: BinaryIO, size: int, file: Path) -> None:
    """Take the disk space now, so that a full disk shows before the work and not after it."""
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle.fileno(), 0, size)
        else:
            handle.truncate(size)
    except OSError as error:
        raise StageError(f"{file}: cannot reserve {size / 1e9:.2f} GB ({error.strerror}): free disk space") from error


def _write_at(handle: BinaryIO, offset: int, data: bytes | memoryview) -> None:
    try:
        handle.seek(offset)
        view = memoryview(data)
        while view:
            view = view[handle.write(view) :]
    except OSError as error:
        raise StageError(f"{handle.name}: write failed ({error.strerror}): free disk space and run again") from error


def write_text(file: Path, text: str) -> None:
    """Write a small file at once: readers see the old text or the new one, never a part."""
    temporary = file.with_name(file.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(file)
    except OSError as error:
        raise StageError(f"{file}: write failed ({error.strerror or error})") from error


def file_digest(file: Path) -> str:
    """sha256 of a file's content, as hex."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
