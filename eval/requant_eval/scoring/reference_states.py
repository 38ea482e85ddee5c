"""The reference's final hidden states at the scored positions in a file, and its head.

32 to 85 times smaller than its logits. The head is in the same file, or in one of its own that all sets of a model
share (`reference_head`). A safetensors file, written and read row by row, never whole in memory. Its metadata has the
digest of the evaluation set, and a checksum of all of the file, which `prove` computes again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from requant_eval.errors import EvaluationError
from requant_eval.scoring import reference_head, summed_file
from requant_eval.scoring.lm_head import Head
from requant_eval.scoring.summed_file import SummedFile

FORMAT = "requant-reference-2"


class Reference:
    """A reference file: `hidden(start, stop)` reads rows, `head` is the reference's LM head."""

    def __init__(self, path: Path, *, digest: str, device: torch.device, beside: Iterable[Reference] = ()) -> None:
        """Opens `path` for an evaluation set with `digest`; the head is loaded onto `device`.

        beside: references of other sets; an equal head of one of them is shared.

        Raises:
            EvaluationError: not a reference file, one of another evaluation set, or one whose head is not there.
        """
        file = summed_file.open_file(path)
        meta = _metadata(path, file, digest)
        self.path, self.digest, self.device = path, digest, device
        self.head_file = _head_file(path, meta)
        self.head: Head = self._head(file, meta, beside)
        self._rows: Any = file.get_slice("hidden")

    def _head(self, file: Any, meta: dict[str, str], beside: Iterable[Reference]) -> Head:
        """The head on the device; that of another reference where it is the same."""
        others = list(beside)
        if self.head_file is not None:
            for other in others:
                if other.head_file == self.head_file:
                    return other.head
            file, meta = reference_head.opened(*self.head_file)
        loaded = reference_head.head_in(file, meta).to(self.device)
        return next((other.head for other in others if other.head.equals(loaded)), loaded)

    def hidden(self, start: int, stop: int) -> Tensor:
        """Hidden states of scored tokens start..stop-1, in window order: [stop - start, hidden]."""
        rows: Tensor = self._rows[start:stop]
        return rows.to(self.device)


def prove(path: Path, *, digest: str) -> int:
    """Reads a reference file for an evaluation set with `digest` whole: its bytes are those that were written.

    A head in a file of its own is there; its bytes are read by `reference_head.prove`. Returns the number of rows.

    Raises:
        EvaluationError: not a reference file, one of another evaluation set, or a damaged one.
    """
    file = summed_file.open_file(path)
    meta = _metadata(path, file, digest)
    shapes = summed_file.prove_sum(path, file, meta)
    if (head := _head_file(path, meta)) is not None:
        reference_head.opened(*head)
    return shapes["hidden"][0]


class ReferenceWriter:
    """Writes a reference file, rows in any order.

    The file gets its name when it is closed without an error.
    """

    def __init__(
        self, path: Path, *, rows: int, like: Tensor, head: Head, digest: str, head_file: Path | None = None
    ) -> None:
        """rows: scored tokens. like: a hidden state tensor [..., hidden] that sets width and dtype.

        head_file: in the directory of `path`, of all sets of this model; None: the head is written into `path`.
        """
        meta, tensors = {"format": FORMAT, "digest": digest}, {}
        checksum = None if head_file is None else reference_head.keep(head_file, head)
        if head_file is None or checksum is None:
            meta |= reference_head.numbers_of(head)
            tensors = reference_head.tensors_of(head)
        else:
            meta |= {"head": head_file.name, "head_checksum": checksum}
        self._file = SummedFile(path, meta, tensors, {"hidden": (like.dtype, [rows, like.shape[-1]])})

    def write(self, start: int, hidden: Tensor) -> None:
        """Rows start.. of the file: hidden states [..., hidden]."""
        self._file.write("hidden", start, hidden.detach().cpu().flatten(0, -2))

    def write_all(self, spans: Sequence[slice], hidden: Tensor) -> None:
        """Rows [n, hidden] of several spans of the file, one after another; one copy to the host."""
        rows, at = hidden.detach().cpu(), 0
        for span in spans:
            self.write(span.start, rows[at : at + span.stop - span.start])
            at += span.stop - span.start

    def __enter__(self) -> ReferenceWriter:
        self._file.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)


def _metadata(path: Path, file: Any, digest: str) -> dict[str, str]:
    """The metadata of an open file; raises EvaluationError unless it is a reference for a set with `digest`."""
    meta = summed_file.metadata(path, file, FORMAT)
    if (written_for := meta.get("digest", "none")) != digest:
        raise EvaluationError(
            f"{path}: written for evaluation set {written_for[:12]}, this one is {digest[:12]}: "
            "other tokens are never compared, score the reference on this set"
        )
    return meta


def _head_file(path: Path, meta: dict[str, str]) -> tuple[Path, str] | None:
    """(file of the head, its checksum), beside the reference; None where the head is in the reference."""
    if "head" not in meta:
        return None
    return path.parent / Path(meta["head"]).name, meta.get("head_checksum", "")
