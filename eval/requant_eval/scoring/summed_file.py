"""Safetensors files with a checksum of all that they hold, written and read row by row.

The checksum stands in the metadata. It is a sum over rows, which may come in any order.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from requant_eval import whole_files
from requant_eval.errors import EvaluationError
from requant_eval.regular_files import require_regular

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_NONE_YET = "-" * 16  # in the checksum's place until the file is whole
_READ = 1024  # rows at a time


def open_file(path: Path) -> Any:
    """An open safetensors file; raises EvaluationError where it is none."""
    try:
        require_regular(path)
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise EvaluationError(f"{path}: no readable reference ({error}): score the reference first") from error


def metadata(path: Path, file: Any, expected: str) -> dict[str, str]:
    """The metadata of an open file; raises EvaluationError unless it is of the format `expected`."""
    meta: dict[str, str] = file.metadata() or {}
    if meta.get("format") != expected:
        raise EvaluationError(f"{path}: format is {meta.get('format')!r}, expected {expected!r}: write it anew")
    return meta


def prove_sum(path: Path, file: Any, meta: Mapping[str, str]) -> dict[str, list[int]]:
    """Read all of an open file: its bytes are those that were written. Returns the shapes by name.

    Raises EvaluationError for a damaged file.
    """
    said = {key: value for key, value in meta.items() if key != "checksum"}
    changed = f"{path}: damaged (its bytes have changed): score the reference again"
    try:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes: dict[str, list[int]] = {name: part.get_shape() for name, part in slices.items()}
        total = _sum_of_header(said, shapes)
        for name, part in slices.items():
            for at in range(0, shapes[name][0], _READ):
                total += _sum_of_rows(name, at, part[at : at + _READ])
    except (SafetensorError, KeyError, IndexError, RuntimeError) as error:
        raise EvaluationError(changed) from error
    if meta.get("checksum") != _hex(total):
        raise EvaluationError(changed)
    return shapes


class SummedFile:
    """A file in the making: some tensors whole, one by rows. It gets its name when closed without an error."""

    def __init__(
        self,
        path: Path,
        meta: Mapping[str, str],
        whole: Mapping[str, Tensor],
        rows: Mapping[str, tuple[torch.dtype, Sequence[int]]] | None = None,
    ) -> None:
        """whole: tensors that are written at the start. rows: name -> dtype and shape of what `write` fills."""
        whole_files.make_directory(path.parent)
        small = {name: tensor.detach().cpu() for name, tensor in whole.items()}
        shapes = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in small.items()}
        shapes |= {name: (dtype, list(shape)) for name, (dtype, shape) in (rows or {}).items()}
        self._sum = _sum_of_header(dict(meta), {name: shape for name, (_, shape) in shapes.items()})
        self._sum += sum(_sum_of_rows(name, 0, tensor) for name, tensor in small.items())
        header, offsets, total = _header(shapes, {**meta, "checksum": _NONE_YET})
        self._checksum_at = header.index(_NONE_YET.encode())
        self._starts = {name: len(header) + offset for name, offset in offsets.items()}
        self._begin = [(0, memoryview(header)), *((self._starts[n], _bytes(t)) for n, t in small.items())]
        self._size = len(header) + total
        # Plain writes, not a memory map: a full disk is then an OSError here, not a SIGBUS.
        self._whole = whole_files.whole_file(path, self._size)

    @property
    def checksum(self) -> str:
        """Of what has been given so far."""
        return _hex(self._sum)

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Rows start.. of a tensor: [n, ...], on the host."""
        self._sum += _sum_of_rows(name, start, rows)
        data = _bytes(rows)
        self._file.seek(self._starts[name] + start * (data.nbytes // max(len(rows), 1)))
        self._file.write(data)

    def __enter__(self) -> SummedFile:
        self._file = self._whole.__enter__()
        try:
            self._file.truncate(self._size)
            for offset, data in self._begin:
                self._file.seek(offset)
                self._file.write(data)
            self._begin = []
        except BaseException as error:
            self._whole.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._file.seek(self._checksum_at)
            self._file.write(self.checksum.encode())
        self._whole.__exit__(kind, error, trace)


def _sum_of_header(meta: dict[str, str], shapes: dict[str, list[int]]) -> int:
    """CRC-32 of what a header says, its checksum aside."""
    return zlib.crc32(json.dumps([meta, shapes], sort_keys=True).encode())


def _sum_of_rows(name: str, start: int, rows: Tensor) -> int:
    """Sum of the rows' CRC-32, each begun with the tensor's name and the row's number: they come in any order."""
    data, first = _bytes(rows), zlib.crc32(name.encode()) + start
    size = data.nbytes // max(len(rows), 1)
    return sum(zlib.crc32(data[i * size : (i + 1) * size], (first + i) % 2**32) for i in range(len(rows)))


def _hex(total: int) -> str:
    return f"{total % 2**64:016x}"


def _header(
    shapes: dict[str, tuple[torch.dtype, list[int]]], meta: dict[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """The safetensors header, each tensor's offset and the size of the data.

    Source of the format: README of huggingface/safetensors.
    """
    entries: dict[str, Any] = {"__metadata__": meta}
    offsets: dict[str, int] = {}
    end = 0
    # Widest first: every tensor starts on a multiple of its item size.
    for name, (dtype, shape) in sorted(shapes.items(), key=lambda item: -item[1][0].itemsize):
        offsets[name] = end
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        entries[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets, end


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, row-major; numpy has no bfloat16."""
    flat: npt.NDArray[np.uint8] = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return flat.data
