"""A directory of safetensors, read tensor by tensor. Writing is `writer`.

Opening reads the headers only; `read` then reads exactly the bytes of one tensor (no mmap: the resident set stays one
tensor). Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch

from requant.errors import InputError, StageError
from requant.runtime.pinned_memory import allocate
from requant_eval import strict_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER = 100 * 2**20
PART = 2**25  # bytes of a tensor that a thread reads at a time
READERS = min(8, os.cpu_count() or 1)

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {v: k for k, v in DTYPES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Dtype, shape and place of one tensor: `offset` counts from the start of `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensor table of one safetensors file.

    Raises InputError when the file is missing, cut or corrupt.
    """
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
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{file}: corrupt safetensors header ({error}): download the file again") from error
    if not isinstance(table, dict):
        raise InputError(f"{file}: corrupt safetensors header (no table): download the file again")
    table.pop("__metadata__", None)
    infos = {name: _info(file, name, entry, 8 + length) for name, entry in table.items()}
    end = max((i.offset + i.nbytes for i in infos.values()), default=8 + length)
    if end > size:
        cut = next(n for n, i in infos.items() if i.offset + i.nbytes > size)
        raise InputError(
            f"{file}: truncated: {size} bytes, its header describes {end} ({cut!r} is cut): download it again"
        )
    return infos


def _info(file: Path, name: str, entry: Mapping[str, Any], base: int) -> TensorInfo:
    try:
        dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
        begin, end = entry["data_offsets"]
        if not (isinstance(begin, int) and isinstance(end, int)):
            raise TypeError("offsets are not whole numbers")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{file}: tensor {name!r} has an unreadable header entry {entry!r}: download the file again"
        ) from error
    nbytes = dtype.itemsize
    for n in shape:
        nbytes *= n
    if begin < 0 or min(shape, default=0) < 0 or end - begin != nbytes:
        raise InputError(f"{file}: tensor {name!r} spans {end - begin} bytes, its shape {shape} needs {nbytes}")
    return TensorInfo(name=name, dtype=dtype, shape=shape, file=file, offset=base + begin, nbytes=nbytes)


class Weights(Protocol):
    """Tensors by their names in a 16-bit checkpoint.

    A `Checkpoint`, or what is computed from one as it is read.
    """

    @property
    def path(self) -> Path:
        """The directory that is read, for messages."""

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor, its Conv1D weights as a 16-bit checkpoint holds them, on any device."""


class Checkpoint(Mapping[str, TensorInfo]):
    """A directory of safetensors: name -> TensorInfo of every tensor.

    `read` gives the values, `config` is config.json.
    Raises InputError when there are no safetensors (pickles are never loaded), a shard is missing or cut, or
    the index names a tensor that its shard does not hold.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        if not path.is_dir():
            raise InputError(f"{path}: no such model directory")
        self._infos = _tables(path)

    def __getitem__(self, name: str) -> TensorInfo:
        try:
            return self._infos[name]
        except KeyError:
            raise KeyError(f"{self.path}: no tensor {name!r}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def config(self) -> dict[str, Any]:
        """config.json as raw JSON."""
        return read_json(self.path / "config.json", constants=True)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` on the CPU, in the dtype and shape of the file."""
        return read_tensor(self[name])


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """Read one tensor; several threads read a large one.

    Raises StageError when the file changed or cannot be read.
    """
    flat = allocate(info.nbytes)
    parts = cut(info.nbytes, PART)
    with opened(info) as file:
        if len(parts) > 1:  # one thread would spend its time on the pages of new memory
            with ThreadPoolExecutor(min(len(parts), READERS)) as pool:
                list(pool.map(lambda part: read_part(file, info, part, flat[part]), parts))
        elif parts:
            read_part(file, info, parts[0], flat)
    return flat.view(info.dtype).reshape(info.shape)


def cut(nbytes: int, size: int) -> list[slice]:
    """`nbytes` bytes as parts of `size`, the last one shorter."""
    return [slice(start, min(start + size, nbytes)) for start in range(0, nbytes, size)]


@contextmanager
def opened(info: TensorInfo) -> Iterator[FileIO]:
    """A tensor's file, open while parts of it are read.

    An OSError inside the block becomes a StageError.
    """
    try:
        with info.file.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise StageError(f"{info.file}: {info.name!r} cannot be read ({error.strerror or error})") from error


def read_part(file: FileIO, info: TensorInfo, part: slice, into: torch.Tensor) -> None:
    """Read a part of a tensor's bytes into memory on the CPU, uint8, of the same length.

    Raises StageError where the file ends.

    file: the tensor's; several threads may read from it at once.
    """
    view, got = memoryview(into.numpy().data), 0
    while got < len(view):
        n = os.preadv(file.fileno(), [view[got:]], info.offset + part.start + got)
        if not n:
            raise StageError(f"{info.file}: {info.name!r} ends after {part.start + got} of {info.nbytes} bytes")
        got += n


def read_json(file: Path, *, constants: bool = False) -> dict[str, Any]:
    """A JSON object from `file`, read strictly (`requant_eval.strict_json`).

    Raises InputError when it is missing, not JSON, beyond the limits, or not an object.
    constants: whether NaN and infinities are numbers.
    """
    try:
        value = strict_json.load(file, constants=constants)
    except FileNotFoundError:
        raise InputError(f"{file}: missing") from None
    except strict_json.JsonError as error:
        raise InputError(f"{file}: {error}") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from error
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
    gguf = sorted(path.glob("*.gguf"))
    if gguf:
        raise InputError(
            f"{path}: only GGUF weights ({gguf[0].name}): no adapter was trained on these. "
            "Use the 16-bit or bitsandbytes model that the adapter names as its base"
        )
    raise InputError(f"{path}: no safetensors weights found")


def file_digest(file: Path) -> str:
    """sha256 of a file's content, as hex."""
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
