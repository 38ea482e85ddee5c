"""Score files: the cached scores of a run's variants on its sets, and their answers."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from requant.checkpoint.atomic_write import read_state
from requant.checkpoint.run_directory import key_of
from requant.data import canaries
from requant.data.canaries import Canaries
from requant.data.prompts import Prompts
from requant.errors import StageError
from requant.outgoing import masked

if TYPE_CHECKING:
    from requant_eval.scoring.batches import BatchSize
    from requant_eval.scoring.reference_states import Reference
    from requant_eval.scoring.token_scores import TokenScores
    from requant_eval.scoring.windows import EvalSet

log = logging.getLogger(__name__)
OnProgress = Callable[[int, str], None]  # (done of the current part, what)
Questions = Canaries | Prompts
REFERENCE = "adapter"  # the variant that KL compares the others with


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of one run's variants on its sets, in files of `cache`.

    A file's name depends on everything that the scores in it depend on. keys: variant name -> digest of its sources.
    kl: also compare with the reference, whose final hidden states are cached. questions: what variants answer.
    free: bytes of the device; a variant that was not asked for want of memory is asked where they are enough now.
    """

    cache: Path
    sets: Sequence[EvalSet]
    keys: Mapping[str, str]
    device: torch.device
    dtype: torch.dtype
    kl: bool
    questions: tuple[Questions, ...] = ()
    free: int = 0

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
    def reference_head(self) -> Path:
        """The file of the reference's head, which all sets share."""
        key = key_of(self.keys[REFERENCE], str(self.dtype), self.device.type)
        return self.cache / f"reference-head-{key[:16]}.safetensors"

    def answer_files(self, asked: Questions) -> dict[str, Path]:
        """The file of each variant's answers."""
        parts = (asked.digest, str(self.dtype), self.device.type)
        names = [v for v in asked.asked if v in self.keys]
        return {v: self.cache / f"{asked.kind}-{v}-{key_of(self.keys[v], *parts)[:16]}.json" for v in names}

    @property
    def _answer_files(self) -> list[Path]:
        return [file for asked in self.questions for file in self.answer_files(asked).values()]

    @property
    def files(self) -> list[Path]:
        """All of these files: scores, hidden states of the reference, answers."""
        scores = [self.file(v, s) for v in self.keys for s in self.sets]
        states = [self.reference_head, *(self.reference(s) for s in self.sets)] if self.kl else []
        return [*scores, *states, *self._answer_files]

    @property
    def key(self) -> str:
        """Digest of the names of all scores and answers."""
        answers = [file.name for file in self._answer_files]
        return key_of([self.file(v, s).name for v in self.keys for s in self.sets], *([answers] if answers else []))

    def missing(self) -> dict[str, list[EvalSet]]:
        """Variants and sets without scores, {variant: sets}, the reference first.

        The reference is scored again where its hidden states are lost and others need them. A variant without sets has
        only canaries left to answer.
        """
        names = sorted(self.keys, key=lambda n: n != REFERENCE)
        todo = {v: [s for s in self.sets if self._saved(v, s) is None] for v in names}
        if self.kl and any(todo.values()):
            from requant_eval.scoring import reference_head
            from requant_eval.scoring.reference_states import prove

            read_state(self.reference_head, reference_head.prove)  # where it is damaged, all states are lost
            lost = [s for s in self.sets if read_state(self.reference(s), partial(prove, digest=s.digest)) is None]
            todo[REFERENCE] = [s for s in self.sets if s in todo[REFERENCE] or s in lost]
        return {v: sets for v, sets in todo.items() if sets or v in self.unanswered()}

    def unanswered(self) -> dict[str, list[tuple[Questions, Path]]]:
        """The variants that are to be asked, and what, with the files for the answers."""
        found: dict[str, list[tuple[Questions, Path]]] = {}
        for asked in self.questions:
            for variant, file in self.answer_files(asked).items():
                given = _given(asked, file)
                if given is None or (given[1] is not None and given[1] <= self.free):
                    found.setdefault(variant, []).append((asked, file))
        return found

    def answers(self, asked: Questions) -> dict[str, list[Any]]:
        """The answers of each variant; raises StageError where a file is missing or damaged."""
        return {v: _answers(asked, file) for v, file in self.answer_files(asked).items()}

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


def score_set(
    scores: Scores, name: str, model: Any, s: EvalSet, batch: BatchSize, runtime: str, reference: Reference | None,
    on_progress: OnProgress, on_note: Callable[[str], None],
) -> None:  # fmt: skip
    """Write the scores of one variant on one set; of the reference also the hidden states."""
    from requant_eval.scoring.score_loop import score

    log.info("scoring %s on %s", name, s.name)
    states = scores.reference(s) if scores.kl else None
    is_reference = name == REFERENCE
    result = score(
        model,
        s,
        batch=batch,
        device=scores.device,
        on_progress=lambda at, _: on_progress(at, s.name),
        on_note=on_note,
        reference=reference,
        write_reference=states if is_reference else None,
        reference_head=scores.reference_head if states and is_reference else None,
    )
    result.runtime = runtime
    result.save(scores.file(name, s))


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


def _answers(asked: Questions, file: Path) -> list[Any]:
    """The answers in one file; raises StageError for a damaged file, which is removed."""
    found = _given(asked, file)
    if found is None:
        raise StageError(f"{file}: no answers: the same command asks again")
    return found[0]


def _given(asked: Questions, file: Path) -> tuple[list[Any], int | None] | None:
    """(saved answers of one variant, free bytes from which it is asked again); None where none can be read."""
    return read_state(file, partial(_answers_of, asked))


def _answers_of(asked: Questions, file: Path) -> tuple[list[Any], int | None]:
    """What one file holds, as many answers as there are questions."""
    found, again_from = canaries.load_answers(file)
    if not asked.fits(found):
        raise ValueError(f"{len(found)} answers to {len(asked.items)} questions")
    return found, again_from
