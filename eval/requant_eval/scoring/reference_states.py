"""The reference's final hidden states at the scored positions and its head, in one file.

32 to 85 times smaller than its logits. A safetensors file, written and read row by row, never whole in memory. Its
metadata has the digest of the evaluation set.
"""

from __future__ import annotations

import json
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
from requant_eval.scoring.lm_head import Head

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
FORMAT = "requant-reference-1"


class Reference:
    """A reference file: `hidden(start, stop)` reads rows, `head` is the reference's LM head."""

    def __init__(self, path: Path, *, digest: str, device: torch.device) -> None:
        """Opens `path` for an evaluation set with `digest`; the head is loaded onto `device`.

        Raises:
            EvaluationError: not a reference file, or one of another evaluation set.
        """
        try:
            file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise EvaluationError(f"{path}: no readable reference ({error}): score the reference first") from error
        meta = file.metadata() or {}
        if meta.get("format") != FORMAT:
            raise EvaluationError(f"{path}: format is {meta.get('format')!r}, expected {FORMAT!r}: write it anew")
        if meta["digest"] != digest:
            raise EvaluationError(
                f"{path}: written for evaluation set {meta['digest'][:12]}, this one is {digest[:12]}: "
                "other tokens are never compared, score the reference on this set"
            )
        names = set(file.keys())
        bias = file.get_tensor("bias") if "bias" in names else None
        softcap = float(meta["softcap"]) if "softcap" in meta else None
        head = Head(file.get_tensor("weight"), bias, float(meta["scale"]), softcap)
        self.head = head.to(device)
        self._rows: Any = file.get_slice("hidden")
        self.device = device

    def hidden(self, start: int, stop: int) -> Tensor:
        """Hidden states of scored tokens start..stop-1, in window order: [stop - start, hidden]."""
        rows: Tensor = self._rows[start:stop]
        return rows.to(self.device)


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
        small = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        shapes = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in small.items()}
        shapes["hidden"] = (like.dtype, [rows, width])
        header, offsets, total = _header(shapes, metadata)
        self._start, self._row_bytes = len(header) + offsets["hidden"], width * like.dtype.itemsize
        self._begin = [(0, memoryview(header)), *((len(header) + offsets[n], _bytes(t)) for n, t in small.items())]
        self._size = len(header) + total
        # Plain writes, not a memory map: a full disk is then an OSError here, not a SIGBUS.
        self._whole = whole_files.whole_file(path, self._size)

    def write(self, start: int, hidden: Tensor) -> None:
        """Rows start.. of the file: hidden states [n, hidden]."""
        self._file.seek(self._start + start * self._row_bytes)
        self._file.write(_bytes(hidden))

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
        self._whole.__exit__(kind, error, trace)


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
