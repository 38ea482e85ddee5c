"""Score files: the cached scores of a run's variants on its sets, and their canary answers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from requant.checkpoint.atomic_write import read_state
from requant.checkpoint.run_directory import key_of
from requant.data import canaries
from requant.data.canaries import Canaries, CanaryFacts
from requant.errors import StageError
from requant.outgoing import masked

if TYPE_CHECKING:
    from requant_eval.scoring.token_scores import TokenScores
    from requant_eval.scoring.windows import EvalSet

REFERENCE = "adapter"  # the variant that KL compares the others with


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one run's variants on its sets, in files of `cache`.

    A file's name depends on everything that the scores in it depend on. keys: variant name -> digest of its sources.
    kl: also compare with the reference, whose final hidden states are cached.
    """

    cache: Path
    sets: Sequence[EvalSet]
    keys: Mapping[str, str]
    device: torch.device
    dtype: torch.dtype
    kl: bool
    canaries: Canaries | None = None

    def __post_init__(self) -> None:
        for name in ("cache",):  # callers may give text
            object.__setattr__(self, name, Path(getattr(self, name)))

    def file(self, variant: str, s: EvalSet) -> Path:
        """The file of one variant's scores on one set."""
        reference = self.keys[REFERENCE] if self.kl and variant != REFERENCE else None
        key = key_of(self.keys[variant], s.digest, str(self.dtype), self.device.type, reference)
        return self.cache / f"{variant}-{_in_file_names(s.name)}-{key[:16]}.safetensors"

    def reference(self, s: EvalSet) -> Path:
        """The file of the reference's hidden states on one set."""
        key = key_of(self.keys[REFERENCE], s.digest, str(self.dtype), self.device.type)
        return self.cache / f"reference-{_in_file_names(s.name)}-{key[:16]}.safetensors"

    @property
    def answer_files(self) -> dict[str, Path]:
        """The file of each variant's answers to the canaries; {} without canaries."""
        if self.canaries is None:
            return {}
        parts = (self.canaries.digest, str(self.dtype), self.device.type)
        names = [v for v in canaries.ASKED if v in self.keys]
        return {v: self.cache / f"canaries-{v}-{key_of(self.keys[v], *parts)[:16]}.json" for v in names}

    @property
    def files(self) -> list[Path]:
        """All of these files: scores, hidden states of the reference, answers."""
        scores = [self.file(v, s) for v in self.keys for s in self.sets]
        return [*scores, *(self.reference(s) for s in self.sets if self.kl), *self.answer_files.values()]

    @property
    def key(self) -> str:
        """Digest of the names of all scores and answers."""
        answers = [file.name for file in self.answer_files.values()]
        return key_of([self.file(v, s).name for v in self.keys for s in self.sets], *([answers] if answers else []))

    def missing(self) -> dict[str, list[EvalSet]]:
        """Variants and sets without scores, {variant: sets}, the reference first.

        The reference is scored again where its hidden states are lost and others need them. A variant without sets has
        only canaries left to answer.
        """
        names = sorted(self.keys, key=lambda n: n != REFERENCE)
        todo = {v: [s for s in self.sets if self._saved(v, s) is None] for v in names}
        if self.kl and any(todo.values()):
            from requant_eval.scoring.reference_states import prove

            lost = [s for s in self.sets if read_state(self.reference(s), partial(prove, digest=s.digest)) is None]
            todo[REFERENCE] = [s for s in self.sets if s in todo[REFERENCE] or s in lost]
        return {v: sets for v, sets in todo.items() if sets or v in self.unanswered()}

    def unanswered(self) -> dict[str, Path]:
        """The variants without saved answers, and the files for them."""
        return {v: f for v, f in self.answer_files.items() if self._given(f) is None}

    def answers(self) -> CanaryFacts | None:
        """The answers of all variants, for the report; None without canaries."""
        if self.canaries is None:
            return None
        return self.canaries.result({v: self._answers(file) for v, file in self.answer_files.items()})

    def _answers(self, file: Path) -> list[str]:
        """The answers in one file, one to each canary; raises StageError for a damaged file, which is removed."""
        found = self._given(file)
        if found is None:
            raise StageError(f"{file}: no answers: the same command asks again")
        return found

    def _given(self, file: Path) -> list[str] | None:
        """The saved answers of one variant; None where there are none, or none that can be read."""
        assert self.canaries is not None
        return read_state(file, partial(_answers_of, len(self.canaries.items)))

    def load(self) -> dict[str, dict[str, TokenScores]]:
        """All scores, {set: {variant: scores}}; raises StageError where some are missing."""
        return {s.name: {v: self.read(v, s) for v in self.keys} for s in self.sets}

    def read(self, variant: str, s: EvalSet) -> TokenScores:
        """The saved scores of one variant on one set; StageError where there are none."""
        saved = self._saved(variant, s)
        if saved is None:
            raise StageError(f"{self.file(variant, s)}: no scores: the same command scores it again")
        return saved

    def _saved(self, variant: str, s: EvalSet) -> TokenScores | None:
        """The saved scores of one variant; None where there are none, or none that can be read and are of this set."""
        return read_state(self.file(variant, s), partial(_scores_of, s))


def _in_file_names(name: str) -> str:
    """The name of a set without secrets, of characters that file systems take."""
    return re.sub(r"[^\w.-]+", "-", masked(name))


def _scores_of(s: EvalSet, file: Path) -> TokenScores:
    """The scores in a file; EvaluationError or ValueError where they are damaged or of another set."""
    from requant_eval.scoring.token_scores import TokenScores

    scores = TokenScores.load(file)
    if scores.digest != s.digest or len(scores.nll) != s.n_scored:
        raise ValueError(f"{len(scores.nll)} tokens of set {scores.digest[:12]}, not of {s.digest[:12]}")
    return scores


def _answers_of(count: int, file: Path) -> list[str]:
    """The answers to `count` canaries in one file."""
    found = canaries.load_answers(file)
    if len(found) != count:
        raise ValueError(f"{len(found)} answers to {count} canaries")
    return found
