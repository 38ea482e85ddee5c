"""The first documents of every text as the model will see them, scored parts apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from requant.run.prepared import Prepared


@dataclass(frozen=True, slots=True)
class SampleText:
    """One document. title: which text it is of. parts: (text, whether its tokens are scored), in order."""

    title: str
    parts: tuple[tuple[str, bool], ...]


def sample_texts(prepared: Prepared, count: int) -> list[SampleText]:
    """The first `count` documents of each calibration source and evaluation set."""
    texts, found = prepared.texts, []
    for name, documents in texts.first_documents.items():
        for number, document in enumerate(documents[:count], 1):
            found.append(SampleText(f"calibration {name}, document {number}", _parts(prepared, document.ids, ())))
    for s in texts.sets:
        for window in [w for w in s.windows if w.document < count]:
            title = f"evaluation {s.name}, document {window.document + 1}"
            parts = _parts(prepared, window.ids.tolist(), window.scored.tolist())
            again = found and found[-1].title == title
            found.append(SampleText(f"{title}, next window" if again else title, parts))
    return found


def _parts(prepared: Prepared, ids: Sequence[int], scored: Sequence[bool]) -> tuple[tuple[str, bool], ...]:
    """Runs of tokens that are scored alike, as text. scored: empty for text that is not scored."""
    flags = scored or [False] * len(ids)
    runs = groupby(zip(ids, flags, strict=True), key=lambda pair: bool(pair[1]))
    return tuple((prepared.texts.decode([i for i, _ in run]), flag) for flag, run in runs)
