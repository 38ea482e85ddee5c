"""The reference's final hidden states at the scored positions and its head, in one file.

32 to 85 times smaller than its logits. A safetensors file, written and read row by row, never whole in memory. Its
metadata has the digest of the evaluation set, and a checksum of all of the file, which `prove` computes again.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
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
from requant_eval.scoring.lm_head import Head

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
FORMAT = "requant-reference-2"
_NONE_YET = "-" * 16  # in the checksum's place until the file is whole
_READ = 1024  # rows at a time


class Reference:
    """A reference file: `hidden(start, stop)` reads rows, `head` is the reference's LM head."""

    def __init__(self, path: Path, *, digest: str, device: torch.device, beside: Iterable[Reference] = ()) -> None:
        """Opens `path` for an evaluation set with `digest`; the head is loaded onto `device`.

        beside: references of other sets; an equal head of one of them is shared.

        Raises:
            EvaluationError: not a reference file, or one of another evaluation set.
        """
        file = _open(path)
        meta = _metadata(path, file, digest)
        names = set(file.keys())
        bias = file.get_tensor("bias") if "bias" in names else None
        softcap = float(meta["softcap"]) if "softcap" in meta else None
        head = Head(file.get_tensor("weight"), bias, float(meta["scale"]), softcap)
        self.path, self.digest, loaded = path, digest, head.to(device)
        self.head: Head = next((other.head for other in beside if other.head.equals(loaded)), loaded)
        self._rows: Any = file.get_slice("hidden")
        self.device = device

    def hidden(self, start: int, stop: int) -> Tensor:
        """Hidden states of scored tokens start..stop-1, in window order: [stop - start, hidden]."""
        rows: Tensor = self._rows[start:stop]
        return rows.to(self.device)


def prove(path: Path, *, digest: str) -> int:
    """Reads a reference file for an evaluation set with `digest` whole: its bytes are those that were written.

    Returns the number of its rows. Raises:
        EvaluationError: not a reference file, one of another evaluation set, or a damaged one.
    """
    file = _open(path)
    meta = _metadata(path, file, digest)
    found, changed = meta.pop("checksum", None), f"{path}: damaged (its bytes have changed): score the reference again"
    try:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        total = _sum_of_header(meta, {name: part.get_shape() for name, part in slices.items()})
        for name, part in slices.items():
            for at in range(0, part.get_shape()[0], _READ):
                total += _sum_of_rows(name, at, part[at : at + _READ])
        rows = int(slices["hidden"].get_shape()[0])
    except (SafetensorError, KeyError, IndexError, RuntimeError) as error:
        raise EvaluationError(changed) from error
    if found != _hex(total):
        raise EvaluationError(changed)
    return rows


class ReferenceWriter:
    """Writes a reference file, rows in any order.

    The file gets its name when it is closed without an error.
    """

    def __init__(self, path: Path, *, rows: int, like: Tensor, head: Head, digest: str) -> None:
        """rows: scored tokens. like: a hidden state tensor [..., hidden] that sets width and dtype."""
        whole_files.make_directory(path.parent)
        metadata = {"format": FORMAT, "digest": digest, "scale": repr(head.scale)}
        if head.softcap is not None:
            metadata["softcap"] = repr(head.softcap)
        width = like.shape[-1]
        small = {"weight": head.weight.detach().cpu()}
        if head.bias is not None:
            small["bias"] = head.bias.detach().cpu()
        shapes = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in small.items()}
        shapes["hidden"] = (like.dtype, [rows, width])
        self._sum = _sum_of_header(metadata, {name: shape for name, (_, shape) in shapes.items()})
        self._sum += sum(_sum_of_rows(name, 0, tensor) for name, tensor in small.items())
        header, offsets, total = _header(shapes, {**metadata, "checksum": _NONE_YET})
        self._checksum_at = header.index(_NONE_YET.encode())
        self._start, self._row_bytes = len(header) + offsets["hidden"], width * like.dtype.itemsize
        self._begin = [(0, memoryview(header)), *((len(header) + offsets[n], _bytes(t)) for n, t in small.items())]
        self._size = len(header) + total
        # Plain writes, not a memory map: a full disk is then an OSError here, not a SIGBUS.
        self._whole = whole_files.whole_file(path, self._size)

    def write(self, start: int, hidden: Tensor) -> None:
        """Rows start.. of the file: hidden states [..., hidden]."""
        rows = hidden.detach().cpu().flatten(0, -2)
        self._sum += _sum_of_rows("hidden", start, rows)
        self._file.seek(self._start + start * self._row_bytes)
        self._file.write(_bytes(rows))

    def write_all(self, spans: Sequence[slice], hidden: Tensor) -> None:
        """Rows [n, hidden] of several spans of the file, one after another; one copy to the host."""
        rows, at = hidden.detach().cpu(), 0
        for span in spans:
            self.write(span.start, rows[at : at + span.stop - span.start])
            at += span.stop - span.start

    def __enter__(self) -> ReferenceWriter:
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
            self._file.write(_hex(self._sum).encode())
        self._whole.__exit__(kind, error, trace)


def _open(path: Path) -> Any:
    try:
        require_regular(path)
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise EvaluationError(f"{path}: no readable reference ({error}): score the reference first") from error


def _metadata(path: Path, file: Any, digest: str) -> dict[str, str]:
    """The metadata of an open file; raises EvaluationError unless it is a reference for a set with `digest`."""
    meta: dict[str, str] = file.metadata() or {}
    if meta.get("format") != FORMAT:
        raise EvaluationError(f"{path}: format is {meta.get('format')!r}, expected {FORMAT!r}: write it anew")
    if (written_for := meta.get("digest", "none")) != digest:
        raise EvaluationError(
            f"{path}: written for evaluation set {written_for[:12]}, this one is {digest[:12]}: "
            "other tokens are never compared, score the reference on this set"
        )
    return meta


def _sum_of_header(metadata: dict[str, str], shapes: dict[str, list[int]]) -> int:
    """CRC-32 of what a header says, its checksum aside."""
    return zlib.crc32(json.dumps([metadata, shapes], sort_keys=True).encode())


def _sum_of_rows(name: str, start: int, rows: Tensor) -> int:
    """Sum of the rows' CRC-32, each begun with the tensor's name and the row's number: they come in any order."""
    data, first = _bytes(rows), zlib.crc32(name.encode()) + start
    size = data.nbytes // max(len(rows), 1)
    return sum(zlib.crc32(data[i * size : (i + 1) * size], (first + i) % 2**32) for i in range(len(rows)))


def _hex(total: int) -> str:
    return f"{total % 2**64:016x}"


def _header(
    shapes: dict[str, tuple[torch.dtype, list[int]]], metadata: dict[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """The safetensors header, each tensor's offset and the size of the data.

    Source of the format: README of huggingface/safetensors.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
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
