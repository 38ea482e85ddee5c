"""Stage: score every variant on every set and ask it the canaries, one variant resident at a time.

Finished scores and answers are kept and reused.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from requant import canaries, variants
from requant.canaries import Canaries
from requant.errors import StageError
from requant.rundir import key_of

if TYPE_CHECKING:
    from requant_eval.score import TokenScores
    from requant_eval.windows import EvalSet

log = logging.getLogger(__name__)
REFERENCE = "adapter"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Scores:
    """The scores of one run's variants and sets in `cache`, each under a name that holds everything it depends on.

    keys: variant name -> digest of what the variant is made from. kl: also compare with the reference, whose final
    hidden states stay in the cache.
    """

    cache: Path
    sets: Sequence[EvalSet]
    keys: Mapping[str, str]
    device: torch.device
    dtype: torch.dtype
    kl: bool
    canaries: Canaries | None = None

    def file(self, variant: str, s: EvalSet) -> Path:
        """Where the scores of one variant on one set are kept."""
        reference = self.keys[REFERENCE] if self.kl and variant != REFERENCE else None
        key = key_of(self.keys[variant], s.digest, str(self.dtype), self.device.type, reference)
        return self.cache / f"{variant}-{s.name}-{key[:16]}.safetensors"

    def reference(self, s: EvalSet) -> Path:
        """Where the reference's hidden states on one set are kept."""
        key = key_of(self.keys[REFERENCE], s.digest, str(self.dtype), self.device.type)
        return self.cache / f"reference-{s.name}-{key[:16]}.safetensors"

    @property
    def asked(self) -> dict[str, Path]:
        """Where the answers of each variant that is asked are kept; {} without canaries."""
        if self.canaries is None:
            return {}
        parts = (self.canaries.digest, str(self.dtype), self.device.type)
        names = [v for v in canaries.ASKED if v in self.keys]
        return {v: self.cache / f"canaries-{v}-{key_of(self.keys[v], *parts)[:16]}.json" for v in names}

    @property
    def key(self) -> str:
        """Digest of all scores and answers together."""
        answers = [file.name for file in self.asked.values()]
        return key_of([self.file(v, s).name for v in self.keys for s in self.sets], *([answers] if answers else []))

    def missing(self) -> dict[str, list[EvalSet]]:
        """What is not scored yet, {variant: sets}, the reference first (again, if others need its lost states).

        A variant without sets has only canaries left to answer.
        """
        names = sorted(self.keys, key=lambda n: n != REFERENCE)
        todo = {v: [s for s in self.sets if not self.file(v, s).exists()] for v in names}
        if self.kl and any(todo.values()):
            lost = [s for s in self.sets if not self.reference(s).exists()]
            todo[REFERENCE] = [s for s in self.sets if s in todo[REFERENCE] or s in lost]
        return {v: sets for v, sets in todo.items() if sets or v in self.unanswered()}

    def unanswered(self) -> dict[str, Path]:
        """The variants that have not been asked yet, and where their answers go."""
        return {v: file for v, file in self.asked.items() if not file.exists()}

    def answers(self) -> dict[str, Any] | None:
        """What all variants answered, for the report; None without canaries."""
        if self.canaries is None:
            return None
        return self.canaries.result({v: canaries.saved(file) for v, file in self.asked.items()})

    def load(self) -> dict[str, dict[str, TokenScores]]:
        """Everything, {set: {variant: scores}}; raises StageError for a damaged file, which is removed."""
        return {s.name: {v: self._load(self.file(v, s)) for v in self.keys} for s in self.sets}

    @staticmethod
    def _load(file: Path) -> TokenScores:
        from requant_eval.errors import EvaluationError
        from requant_eval.score import TokenScores

        try:
            return TokenScores.load(file)
        except EvaluationError as error:
            file.unlink(missing_ok=True)
            raise StageError(f"{error}; it was removed, the same command scores it again") from error


def evaluate(scores: Scores, places: variants.Places, *, batch: int, progress: Progress | None = None) -> list[str]:
    """Score and ask what is missing; returns the variants that were loaded. Raises StageError for NaN/inf in logits."""
    from requant_eval.errors import EvaluationError

    todo, unanswered = scores.missing(), scores.unanswered()
    questions = len(scores.canaries.items) if scores.canaries else 0
    total = sum(len(s.windows) for sets in todo.values() for s in sets) + questions * len(unanswered)
    done = 0
    for name, sets in todo.items():
        model = variants.load(name, places, device=scores.device, dtype=scores.dtype)

        def tell(at: int, what: str, before: int, name: str = name) -> None:
            if progress:
                progress(before + at, total, f"{name} on {what}")

        try:
            for s in sets:
                _score(scores, name, model, s, batch, partial(tell, before=done))
                done += len(s.windows)
            if name in unanswered:
                _ask(scores, model, unanswered[name], partial(tell, before=done))
                done += questions
        except EvaluationError as error:
            raise StageError(f"variant {name}: {error}") from error
        del model
        gc.collect()
        if scores.device.type == "cuda":
            torch.cuda.empty_cache()
    return list(todo)


Tell = Callable[[int, str], None]


def _score(scores: Scores, name: str, model: Any, s: EvalSet, batch: int, tell: Tell) -> None:
    """One variant on one set, into its file; the reference's hidden states into theirs."""
    from requant_eval.score import score

    log.info("scoring %s on %s", name, s.name)
    compared = scores.reference(s) if scores.kl else None
    own = name == REFERENCE
    result = score(
        model, s, batch=batch, device=scores.device, on_progress=lambda at, _: tell(at, s.name),
        reference=None if own else compared, write_reference=compared if own else None,
    )  # fmt: skip
    result.save(scores.file(name, s))


def _ask(scores: Scores, model: Any, file: Path, tell: Tell) -> None:
    """One variant's answers to all canaries, into its file."""
    assert scores.canaries is not None
    canaries.save(scores.canaries.ask(model, scores.device, lambda at, _: tell(at, "canaries")), file)
