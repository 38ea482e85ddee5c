"""Scores of one variant on one evaluation set, a few numbers per token, and their file."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from requant_eval import whole_files
from requant_eval.errors import EvaluationError
from requant_eval.regular_files import require_regular

FORMAT = "requant-scores-1"
_DTYPES: dict[str, type] = {
    "nll": np.float64, "document": np.int32, "top1": np.bool_, "kl": np.float64, "agree": np.bool_,
}  # fmt: skip
_OPTIONAL = ("kl", "agree")
_KEYS = frozenset({"format", "digest", "nonfinite", "seconds", "runtime"})  # of the metadata, besides the checksum


@dataclass(kw_only=True)
class TokenScores:
    """Scores of n tokens in window order.

    nll: float64 [n], -ln p(token), nats. document: int32 [n], cluster number. top1: bool [n], argmax is the
    token. kl: float64 [n], KL(reference || this) in nats, None without a reference. agree: bool [n],
    argmax is the reference's argmax, None without a reference. nonfinite: tokens with NaN/inf logits, 0 in what `score`
    returns (it raises instead). digest: of the evaluation set. seconds: wall time. runtime: what ran the model, in
    words.
    """

    nll: npt.NDArray[np.float64]
    document: npt.NDArray[np.int32]
    top1: npt.NDArray[np.bool_]
    kl: npt.NDArray[np.float64] | None
    agree: npt.NDArray[np.bool_] | None
    nonfinite: int
    digest: str
    seconds: float
    runtime: str = ""

    def save(self, path: Path) -> None:
        """Writes a safetensors file, whole or not at all, and on the disk."""
        from safetensors.numpy import save

        columns: dict[str, npt.NDArray[Any]] = {"nll": self.nll, "document": self.document, "top1": self.top1}
        columns |= {} if self.kl is None else {"kl": self.kl}
        columns |= {} if self.agree is None else {"agree": self.agree}
        metadata = {
            "format": FORMAT,
            "digest": self.digest,
            "nonfinite": str(self.nonfinite),
            "seconds": repr(self.seconds),
            "runtime": self.runtime,
        }
        metadata["checksum"] = _checksum(columns, metadata)
        whole_files.make_directory(path.parent)
        whole_files.write(path, save(columns, metadata))

    @classmethod
    def load(cls, path: Path) -> TokenScores:
        """Reads what `save` wrote.

        Raises:
            EvaluationError: the file is missing, damaged or something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            require_regular(path)
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise EvaluationError(f"{path}: no readable scores ({error}): score the variant again") from error
        if metadata.get("format") != FORMAT:
            raise EvaluationError(f"{path}: format is {metadata.get('format')!r}, expected {FORMAT!r}: score it again")
        found = metadata.pop("checksum", None)
        wrong = _wrong_column(columns) or next(
            (f"{key!r:.40} is no key of it" for key in metadata if key not in _KEYS), None
        )
        if wrong is None and found != _checksum(columns, metadata):
            wrong = "no checksum" if found is None else "its bytes have changed"
        if wrong:
            raise EvaluationError(f"{path}: damaged ({wrong}): score the variant again")
        try:
            return cls(
                nll=columns["nll"],
                document=columns["document"],
                top1=columns["top1"],
                kl=columns.get("kl"),
                agree=columns.get("agree"),
                nonfinite=int(metadata["nonfinite"]),
                digest=metadata["digest"],
                seconds=float(metadata["seconds"]),
                runtime=metadata.get("runtime", ""),
            )
        except (KeyError, ValueError) as error:
            raise EvaluationError(f"{path}: damaged ({error!r}): score the variant again") from error


def _wrong_column(columns: Mapping[str, npt.NDArray[Any]]) -> str | None:
    """What is wrong with the columns of a file; None: nothing."""
    tokens = columns["nll"].shape if "nll" in columns else None
    for name, dtype in _DTYPES.items():
        if name not in columns:
            if name in _OPTIONAL:
                continue
            return f"no {name}"
        if columns[name].dtype != dtype or columns[name].ndim != 1 or columns[name].shape != tokens:
            return f"{name} is {columns[name].dtype} {columns[name].shape}, expected {dtype.__name__} {tokens}"
    return None


def _checksum(columns: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]) -> str:
    """CRC-32 of all that a file holds, hex: chance changes a byte, nobody forges scores for themselves."""
    text = repr(sorted(metadata.items())).encode()
    for name in sorted(columns):
        text = f"{zlib.crc32(columns[name].tobytes(), zlib.crc32(text + name.encode())):08x}".encode()
    return text.decode()
