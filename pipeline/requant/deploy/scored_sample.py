"""The sample that engines score: beginnings of a run's held-out documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from requant.checkpoint.atomic_write import make_directory, read_state, write_text
from requant.checkpoint.reader import read_json
from requant.checkpoint.run_directory import sealed, unsealed
from requant.outgoing import masked
from requant_eval.regular_files import read_bytes

if TYPE_CHECKING:
    from requant_eval.scoring.windows import EvalSet

DOCUMENTS, TOKENS = 20, 64  # enough for an interval, few enough for a CPU
CACHE, FILE = ".cache", "sample.json"


@dataclass(frozen=True)
class Sample:
    """Rows of token ids and the document of each, numbered from 0 without gaps.

    set, digest: the evaluation set's.
    """

    rows: tuple[tuple[int, ...], ...]
    documents: tuple[int, ...]
    set: str | None = None
    digest: str | None = None

    @classmethod
    def of(cls, sets: Sequence[EvalSet], name: str | None = None) -> Sample:
        """TOKENS tokens of each of the first DOCUMENTS documents of the set `name`, or the first."""
        source = next((s for s in sets if s.name == name), sets[0])
        firsts: dict[int, tuple[int, ...]] = {}
        for window in source.windows:
            if len(window.ids) > 1 and len(firsts) < DOCUMENTS:
                firsts.setdefault(window.document, tuple(window.ids[:TOKENS].tolist()))
        return cls(tuple(firsts.values()), tuple(range(len(firsts))), masked(source.name), source.digest)

    @classmethod
    def load(cls, checkpoint: Path) -> Sample | None:
        """The sample of the run that wrote `checkpoint`.

        None without a run, where an older version ran, and where it is damaged.
        """
        return read_state(checkpoint.absolute().parent / CACHE / FILE, cls._of_file)

    @classmethod
    def _of_file(cls, file: Path) -> Sample:
        raw = unsealed(read_json(file))
        rows = tuple(tuple(int(token) for token in row) for row in raw["rows"])
        return cls(rows, tuple(int(n) for n in raw["documents"]), raw["set"], raw["digest"])

    def save(self, run: Path) -> None:
        """Save it in the run directory, for every `verify` of its checkpoints."""
        text, file = json.dumps(sealed(asdict(self))) + "\n", make_directory(run / CACHE) / FILE
        if not file.is_file() or read_bytes(file) != text.encode():  # a second run does nothing
            write_text(file, text)
