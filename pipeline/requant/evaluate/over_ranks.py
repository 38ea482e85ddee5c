"""Evaluation over ranks: each scores a share of the windows, the first joins the scores.

A share has its own files and, for KL, its own hidden states of the reference: ranks do not communicate until the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from requant.checkpoint.atomic_write import make_directory, remove, write_text
from requant.evaluate import stage as evaluation
from requant.evaluate.scores import REFERENCE, Questions, Scores
from requant.evaluate.stage import EvaluationResult, Progress, Stream
from requant.evaluate.variant_sources import VariantSources
from requant.evaluate.variants import Load
from requant.runtime.ranks import Ranks
from requant_eval.regular_files import read_bytes

if TYPE_CHECKING:
    from requant_eval.scoring.batches import BatchSize
    from requant_eval.scoring.token_scores import TokenScores
    from requant_eval.scoring.windows import EvalSet, Window


def evaluate(
    scores: Scores,
    sources: VariantSources,
    *,
    ranks: Ranks,
    batch: BatchSize | int,
    stream: Stream = "auto",
    progress: Progress | None = None,
    load: Load | None = None,
) -> EvaluationResult:
    """`evaluate.evaluate` on all ranks, called by the first one. load: as there, of a single rank.

    Each rank needs as much memory as a single process. Finished shares of a killed run are reused with the same number
    of ranks.
    """
    if ranks.count == 1:
        return evaluation.evaluate(scores, sources, batch=batch, stream=stream, progress=progress, load=load)
    todo = scores.missing()
    for other in scores.cache.glob("ranks-*"):
        if other != _shares_directory(scores.cache, ranks.count):
            remove(other)
    unfinished = _without_finished(scores, todo)
    result: EvaluationResult = ranks.call(
        score_share,
        replace(unfinished, questions=()),
        sources,
        batch=batch,
        stream=stream,
        first_rank_only={"questions": scores.questions, "progress": progress},
    )
    parts = [share_of(unfinished, rank, ranks.count) for rank in range(ranks.count)]
    for variant, s in ((v, s) for v in todo for s in unfinished.sets if not scores.file(v, s).exists()):
        pieces = [p.read(variant, share) for p in parts for share in p.sets if share.name == s.name]
        join(pieces, s).save(scores.file(variant, s))
    for variant, many in scores.unanswered().items():
        for asked, file in many:
            write_text(file, read_bytes(parts[0].answer_files(asked)[variant]).decode())
    return result


def score_share(
    unfinished: Scores,
    sources: VariantSources,
    *,
    batch: BatchSize | int,
    stream: Stream,
    ranks: Ranks,
    questions: tuple[Questions, ...] = (),
    progress: Progress | None = None,
) -> EvaluationResult:
    """Score this rank's share; the result of all ranks, once all have finished.

    questions: on the first rank only, since a tokenizer is not sent to other processes.
    """
    on_device = replace(unfinished, device=ranks.device_of(unfinished.device), questions=questions)
    share = share_of(on_device, ranks.rank, ranks.count)
    make_directory(share.cache.parent)
    make_directory(share.cache)
    result = evaluation.evaluate(share, sources, batch=batch, stream=stream, progress=progress)
    every = ranks.all_gather_objects(result)
    streamed = dict.fromkeys(name for one in every for name in one["streamed"])
    notes = [f"rank {rank}: {note}" for rank, one in enumerate(every) for note in one["notes"]]
    return {"variants": result["variants"], "streamed": list(streamed), "notes": notes}


def _without_finished(scores: Scores, todo: Mapping[str, Sequence[EvalSet]]) -> Scores:
    """`scores` without the variants and sets that are finished.

    The reference stays where other variants are compared with it: a share may lack its hidden states.
    """
    left = {s.name for sets in todo.values() for s in sets}
    keys = {v: key for v, key in scores.keys.items() if v in todo or (scores.kl and v == REFERENCE)}
    return replace(scores, keys=keys, sets=tuple(s for s in scores.sets if s.name in left))


def share_of(scores: Scores, rank: int, count: int) -> Scores:
    """The scores of one rank's windows, in a cache directory for this rank.

    The first rank also has the questions.
    """
    sets = tuple(share for s in scores.sets for share in _share_of_set(s, rank, count))
    questions = scores.questions if rank == 0 else ()
    return replace(scores, cache=_shares_directory(scores.cache, count) / str(rank), sets=sets, questions=questions)


def _shares_directory(cache: Path, count: int) -> Path:
    return cache / f"ranks-{count}"


def _share_of_set(s: EvalSet, rank: int, count: int) -> Iterator[EvalSet]:
    """One rank's windows of a set as a set, none if it has no windows."""
    windows = rank_windows(s.windows, rank, count)
    if windows:
        digest = hashlib.sha256(f"{s.digest} {rank} {count}".encode()).hexdigest()
        scored = sum(int(w.scored.sum()) for w in windows)
        yield replace(s, windows=windows, digest=digest, n_scored=scored)


def rank_windows(windows: Sequence[Window], rank: int, count: int) -> tuple[Window, ...]:
    """One rank's windows: consecutive, with about the same number of tokens for each rank.

    A window belongs to the rank in whose share of all tokens its middle lies.
    """
    ends = list(accumulate(len(w.ids) for w in windows))
    middles = (2 * end - len(w.ids) for end, w in zip(ends, windows, strict=True))
    return tuple(w for w, at in zip(windows, middles, strict=True) if at * count // (2 * ends[-1]) == rank)


def join(parts: Sequence[TokenScores], s: EvalSet) -> TokenScores:
    """The scores of a set from those of its shares, in their order."""
    first = parts[0]

    def column(name: str) -> Any:
        columns = [getattr(p, name) for p in parts]
        return None if columns[0] is None else np.concatenate(columns)

    return replace(
        first,
        **{name: column(name) for name in ("nll", "document", "top1", "kl", "agree")},
        nonfinite=sum(p.nonfinite for p in parts),
        digest=s.digest,
        seconds=max(p.seconds for p in parts),
    )
