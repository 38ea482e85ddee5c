"""Stage: score every variant on every set, one variant resident at a time; finished scores are kept and reused."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from requant import variants
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
    def key(self) -> str:
        """Digest of all scores together."""
        return key_of([self.file(v, s).name for v in self.keys for s in self.sets])

    def missing(self) -> dict[str, list[EvalSet]]:
        """What is not scored yet, {variant: sets}, the reference first (again, if others need its lost states)."""
        names = sorted(self.keys, key=lambda n: n != REFERENCE)
        todo = {v: [s for s in self.sets if not self.file(v, s).exists()] for v in names}
        if self.kl and any(todo.values()):
            lost = [s for s in self.sets if not self.reference(s).exists()]
            todo[REFERENCE] = [s for s in self.sets if s in todo[REFERENCE] or s in lost]
        return {v: sets for v, sets in todo.items() if sets}

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
    """Score what is missing; returns the variants that were loaded. Raises StageError for NaN/inf in logits."""
    from requant_eval.errors import EvaluationError
    from requant_eval.score import score

    todo = scores.missing()
    total, done = sum(len(s.windows) for sets in todo.values() for s in sets), 0
    for name, sets in todo.items():
        model = variants.load(name, places, device=scores.device, dtype=scores.dtype)
        for s in sets:
            log.info("scoring %s on %s", name, s.name)

            def tell(at: int, _: int, before: int = done, note: str = f"{name} on {s.name}") -> None:
                if progress:
                    progress(before + at, total, note)

            compared = scores.reference(s) if scores.kl else None
            own = name == REFERENCE
            try:
                result = score(
                    model, s, batch=batch, device=scores.device, on_progress=tell,
                    reference=None if own else compared, write_reference=compared if own else None,
                )  # fmt: skip
            except EvaluationError as error:
                raise StageError(f"variant {name}: {error}") from error
            result.save(scores.file(name, s))
            done += len(s.windows)
        del model
        gc.collect()
        if scores.device.type == "cuda":
            torch.cuda.empty_cache()
    return list(todo)
