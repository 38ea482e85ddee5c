"""The header of one safetensors file, read as strictly as the format's own library reads it.

What is accepted here loads everywhere: our rules name what is wrong, and the library has the last word.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from requant.errors import InputError
from requant_eval import strict_json
from requant_eval.regular_files import NotAFileError, open_regular

MAX_HEADER = 100 * 10**6  # bytes, the library's limit
_LARGEST = 2**64  # sizes and places fit 64 bits

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U32": torch.uint32, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {v: k for k, v in DTYPES.items()}
_ENTRY = frozenset({"dtype", "shape", "data_offsets"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Dtype, shape and place of one tensor: `offset` counts from the start of `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    def rows(self, start: int, stop: int) -> TensorInfo:
        """Entries start..stop of the first dimension, where they lie in the file."""
        row = self.nbytes // self.shape[0]
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            offset=self.offset + start * row,
            nbytes=(stop - start) * row,
        )

    def entry(self, index: int) -> TensorInfo:
        """One entry of the first dimension, without that dimension."""
        return replace(self.rows(index, index + 1), shape=self.shape[1:])


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Tensor table of one safetensors file, in the order of the header.

    Raises InputError when the file is missing, cut, corrupt, or one that the safetensors library does not load: tensors
    that overlap, gaps between them or bytes behind the last, a name twice, metadata that is not text.
    """
    try:
        table, start, size = _table(file)
    except FileNotFoundError:
        raise InputError(f"{file}: missing; the checkpoint is incomplete: download it again") from None
    except NotAFileError as error:
        raise InputError(f"{file}: not a safetensors file: {error.strerror}: download it again") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise InputError(f"{file}: corrupt safetensors header ({error}): download the file again") from error
    metadata = table.pop("__metadata__", None)
    if metadata is not None and not _is_text(metadata):
        raise InputError(f"{file}: corrupt safetensors header (__metadata__ is not pairs of text): save the file again")
    infos = {name: _info(file, name, entry, start) for name, entry in table.items()}
    _check_tiling(file, infos, start, size)
    _ask_the_library(file)
    return infos


def _table(file: Path) -> tuple[dict[str, Any], int, int]:
    """(header, where the tensors begin, size of the file in bytes). Raises ValueError for what is no header."""
    with open_regular(file) as f:
        size = f.seek(0, 2)
        f.seek(0)
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size + 1
        if length > min(MAX_HEADER, size - 8):
            raise InputError(f"{file}: not a safetensors file, or truncated ({size} bytes): download it again")
        text = f.read(length)
    if not text.startswith(b"{"):
        raise ValueError("no table")
    table = strict_json.parse(text)
    if not isinstance(table, dict):
        raise ValueError("no table")
    return table, 8 + length, size


def _is_text(metadata: object) -> bool:
    return isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())


def _info(file: Path, name: str, entry: Any, base: int) -> TensorInfo:
    """One entry of the table, its types and its own numbers checked."""
    if not isinstance(entry, dict) or not entry.keys() >= _ENTRY:
        raise _unreadable(file, name, entry)
    dtype, shape, offsets = DTYPES.get(str(entry["dtype"])), entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        raise _unreadable(file, name, entry)
    if dtype is None:
        raise InputError(
            f"{file}: tensor {name[:80]!r} is stored as {entry['dtype']:.20}, which is not read here; what is: "
            f"{', '.join(DTYPES)}. Use the model in 16 bit"
        )
    begin, end = offsets
    nbytes = dtype.itemsize
    for n in shape:
        nbytes *= n
        if nbytes >= _LARGEST:
            raise InputError(f"{file}: tensor {name!r} has an impossible shape {shape!r:.80}: download the file again")
    if end - begin != nbytes:
        raise InputError(f"{file}: tensor {name!r} spans {end - begin} bytes, its shape {tuple(shape)} needs {nbytes}")
    return TensorInfo(name=name, dtype=dtype, shape=tuple(shape), file=file, offset=base + begin, nbytes=nbytes)


def _sizes(value: object) -> bool:
    """Whether a value is a list of whole numbers of 64 bits: no floats, no booleans, none below 0."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < _LARGEST for n in value)


def _unreadable(file: Path, name: str, entry: object) -> InputError:
    return InputError(
        f"{file}: tensor {name[:80]!r} has an unreadable header entry {entry!r:.160}: download the file again"
    )


def _check_tiling(file: Path, infos: Mapping[str, TensorInfo], start: int, size: int) -> None:
    """Raise InputError unless the tensors lie one behind the other, from the header to the end of the file."""
    at, before = start, "the header"
    for info in sorted(infos.values(), key=lambda i: (i.offset, i.nbytes)):
        if info.offset != at:
            what = f"overlaps {before}" if info.offset < at else f"begins {info.offset - at} bytes behind {before}"
            raise InputError(
                f"{file}: tensor {info.name!r} {what}: the safetensors library refuses such a file: download it again"
            )
        at, before = at + info.nbytes, repr(info.name)
    if at > size:
        cut = next(n for n, i in infos.items() if i.offset + i.nbytes > size)
        raise InputError(
            f"{file}: truncated: {size} bytes, its header describes {at} ({cut!r} is cut): download it again"
        )
    if at < size:
        raise InputError(
            f"{file}: {size - at} bytes behind the last tensor: the safetensors library refuses such a file: "
            "download it again"
        )


def _ask_the_library(file: Path) -> None:
    """Open the file as servers do; raise InputError where the library refuses what passed our own rules."""
    from safetensors import safe_open

    try:
        with safe_open(str(file), framework="numpy"):
            pass
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{file}: the safetensors library refuses it ({reason}): download it again") from error
