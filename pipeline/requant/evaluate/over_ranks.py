"""Evaluation over several ranks: each scores its own windows as if these were all, the first puts the parts together.

A part has files and, for KL, hidden states of the reference of its own; ranks need nothing from each other until the end.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from requant.data.canaries import Canaries
from requant.evaluate import stage as evaluation
from requant.evaluate.stage import REFERENCE, Progress, Scores, Stream
from requant.evaluate.variants import VariantSources
from requant.runtime.ranks import Ranks

if TYPE_CHECKING:
    from requant_eval.scoring.token_scores import TokenScores
    from requant_eval.scoring.windows import EvalSet, Window


def evaluate(
    scores: Scores, sources: VariantSources, *, ranks: Ranks, batch: int, stream: Stream = "auto", progress: Progress | None = None
) -> dict[str, Any]:  # fmt: skip
    """As `evaluate.evaluate`, on all ranks: each needs the room that one alone would need. Called by the first.

    Parts of a run that was killed are used again under the same number of ranks; files that it left half-written go.
    """
    for left in scores.cache.rglob(".*.tmp"):
        left.unlink()
    if ranks.count == 1:
        return evaluation.evaluate(scores, sources, batch=batch, stream=stream, progress=progress)
    todo = scores.missing()
    for other in scores.cache.glob("ranks-*"):
        if other != _shelf(scores.cache, ranks.count):
            shutil.rmtree(other)
    wanted = _narrowed(scores, todo)
    told = ranks.call(
        score_part, replace(wanted, canaries=None), sources, batch=batch, stream=stream,
        first_rank_only={"asking": scores.canaries, "progress": progress},
    )  # fmt: skip
    parts = [part(wanted, rank, ranks.count) for rank in range(ranks.count)]
    for variant, s in ((v, s) for v in todo for s in wanted.sets if not scores.file(v, s).exists()):
        pieces = [scores.read(p.file(variant, own)) for p in parts for own in p.sets if own.name == s.name]
        joined(pieces, s).save(scores.file(variant, s))
    for variant, file in scores.unanswered().items():
        shutil.copyfile(parts[0].asked[variant], file)
    return told


def score_part(
    wanted: Scores, sources: VariantSources, *, batch: int, stream: Stream, ranks: Ranks, asking: Canaries | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score this rank's windows of what is wanted; returns what a report tells of it, once all ranks have done so.

    asking: the canaries of the first rank, for a tokenizer does not travel.
    """
    here = replace(wanted, device=ranks.device_of(wanted.device), canaries=asking)
    mine = part(here, ranks.rank, ranks.count)
    mine.cache.mkdir(parents=True, exist_ok=True)
    told = evaluation.evaluate(mine, sources, batch=batch, stream=stream, progress=progress)
    every = ranks.all_gather_objects(told)
    streamed = dict.fromkeys(name for one in every for name in one["streamed"])
    notes = [f"rank {rank}: {note}" for rank, one in enumerate(every) for note in one["notes"]]
    return told | {"streamed": list(streamed), "notes": notes}


def _narrowed(scores: Scores, todo: Mapping[str, Sequence[EvalSet]]) -> Scores:
    """Only what is left to do, and the reference where others are compared with it: parts of it may have to be made first."""
    left = {s.name for sets in todo.values() for s in sets}
    keys = {v: key for v, key in scores.keys.items() if v in todo or (scores.kl and v == REFERENCE)}
    return replace(scores, keys=keys, sets=tuple(s for s in scores.sets if s.name in left))


def part(scores: Scores, rank: int, count: int) -> Scores:
    """What one rank scores, and where it keeps it; the first is also asked the canaries."""
    sets = tuple(own for s in scores.sets for own in _shares(s, rank, count))
    asked = scores.canaries if rank == 0 else None
    return replace(scores, cache=_shelf(scores.cache, count) / str(rank), sets=sets, canaries=asked)


def _shelf(cache: Path, count: int) -> Path:
    return cache / f"ranks-{count}"


def _shares(s: EvalSet, rank: int, count: int) -> Iterator[EvalSet]:
    """The windows of a set that are one rank's, as a set of their own; nothing where there are none."""
    windows = windows_of(s.windows, rank, count)
    if windows:
        digest = hashlib.sha256(f"{s.digest} {rank} {count}".encode()).hexdigest()
        scored = sum(int(w.scored.sum()) for w in windows)
        yield replace(s, windows=windows, digest=digest, n_scored=scored)


def windows_of(windows: Sequence[Window], rank: int, count: int) -> tuple[Window, ...]:
    """Neighbouring windows with about the same number of tokens for each rank: those whose middle lies in its share."""
    ends = list(accumulate(len(w.ids) for w in windows))
    middles = (2 * end - len(w.ids) for end, w in zip(ends, windows, strict=True))
    return tuple(w for w, at in zip(windows, middles, strict=True) if at * count // (2 * ends[-1]) == rank)


def joined(parts: Sequence[TokenScores], s: EvalSet) -> TokenScores:
    """One set's scores out of those of all its windows, in their order."""
    first = parts[0]

    def column(name: str) -> Any:
        columns = [getattr(p, name) for p in parts]
        return None if columns[0] is None else np.concatenate(columns)

    return replace(
        first, **{name: column(name) for name in ("nll", "document", "top1", "kl", "agree")},
        nonfinite=sum(p.nonfinite for p in parts), digest=s.digest, seconds=max(p.seconds for p in parts),
    )  # fmt: skip
