"""Token documents on the disk, known by the digest of all that they depend on.

That is the text's bytes, what is asked of them, the tokenizer's files and settings, the libraries' versions and the
code of this package. A file that is damaged or of something else is no file: its text is tokenized again.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from requant import outgoing
from requant.checkpoint.atomic_write import atomic_write, make_directory, read_state, reading, remove
from requant.checkpoint.reader import file_digest
from requant.checkpoint.run_directory import key_of
from requant.data.documents import Format, TokenDocument
from requant.data.row_files import TextSource
from requant_eval import strict_json

PREFIX = "tokens-"
LIBRARIES = ("transformers", "tokenizers", "jinja2", "sentencepiece", "tiktoken", "pyarrow")
Documents = tuple[list[TokenDocument], list[str]]
"""Documents, and what was told of them."""
_HEX = 64  # characters of the digest that a file begins with


class StoredTokens:
    """The token documents that a run keeps in `folder`, which need not exist.

    used: names of the files that were asked for. made: documents without a file, by its name, until `save`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used: set[str] = set()
        self.made: dict[str, Documents] = {}

    def name(self, source: TextSource, tokenizer: Any, asked: Format, *, completions: bool) -> str | None:
        """The file of a source's documents; None for text that is no local file."""
        if source.path is None or not source.path.is_file():
            return None
        settings = (source.split, source.column, source.documents, source.ignore, source.path.suffixes)
        parts = (
            file_digest(source.path),
            settings,
            str(source),
            tokenizer.made_from,
            asked,
            completions,
            code_digest(),
        )
        return f"{PREFIX}{key_of(*parts)}"

    def load(self, name: str) -> Documents | None:
        """What a file holds, None without one."""
        self.used.add(name)
        return read_state(self.folder / name, _read)

    def save(self) -> None:
        """Write what has no file yet, and remove files that were not asked for.

        What was told is kept as it is or not at all: no file of a run holds secrets and places of this machine.
        """
        for name, (documents, notes) in self.made.items():
            if outgoing.everywhere(notes, outgoing.shared) == notes:
                _write(make_directory(self.folder) / name, documents, notes)
        self.made.clear()
        for file in self.folder.glob(f"{PREFIX}*"):
            if file.name not in self.used:
                remove(file)


@functools.cache
def code_digest() -> str:
    """Digest of what turns text into tokens: the files of this package, the libraries' versions."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return key_of([(file.name, file_digest(file)) for file in files], [_version(name) for name in LIBRARIES])


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _write(file: Path, documents: Sequence[TokenDocument], notes: Sequence[str]) -> None:
    """Digest of the rest; a line of JSON; token ids, flags, lengths, bytes, ends."""
    lengths = np.array([len(document.ids) for document in documents], "<i8")
    parts = [
        np.concatenate([np.array(document.ids, "<i4") for document in documents]),
        np.packbits(np.concatenate([np.array(document.scored, bool) for document in documents])),
        lengths,
        np.array([document.n_bytes for document in documents], "<i8"),
        np.array([document.ended for document in documents], "u1"),
    ]
    head = json.dumps({"tokens": int(lengths.sum()), "documents": len(documents), "notes": list(notes)}) + "\n"
    content = head.encode() + b"".join(part.tobytes() for part in parts)
    with atomic_write(file, _HEX + len(content)) as handle:
        handle.write(hashlib.sha256(content).hexdigest().encode() + content)


def _read(file: Path) -> Documents:
    """What `_write` wrote; ValueError for anything else."""
    with reading(file) as handle:
        digest, content = handle.read(_HEX), handle.read()
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise ValueError("its bytes have changed")
    head, _, rest = content.partition(b"\n")
    facts: Any = strict_json.parse(head.decode())
    tokens, count = facts["tokens"], facts["documents"]
    columns, at = [], 0
    for dtype, size in (("<i4", tokens), ("u1", -(-tokens // 8)), ("<i8", count), ("<i8", count), ("u1", count)):
        columns.append(np.frombuffer(rest, dtype, size, at))
        at += columns[-1].nbytes
    ids, flags, lengths, n_bytes, ended = columns
    scored = np.unpackbits(flags, count=tokens).astype(bool)
    ends = np.cumsum(lengths).tolist()
    return [
        TokenDocument(tuple(ids[end - size : end].tolist()), tuple(scored[end - size : end].tolist()), size_of, last)
        for end, size, size_of, last in zip(
            ends, lengths.tolist(), n_bytes.tolist(), (ended != 0).tolist(), strict=True
        )
    ], list(facts["notes"])
