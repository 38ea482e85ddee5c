"""Stage: score every variant on every set and ask it the canaries, one variant at a time, whole or block by block.

Finished scores and answers are kept and reused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from requant.checkpoint.run_directory import key_of
from requant.data import canaries
from requant.data.canaries import Canaries
from requant.errors import StageError
from requant.evaluate import streamed, variants
from requant.evaluate.memory import Size
from requant.runtime.device import USABLE, free_bytes, free_memory
from requant_eval.scoring.score_loop import CHUNK_LOGITS

if TYPE_CHECKING:
    from requant_eval.scoring.token_scores import TokenScores
    from requant_eval.scoring.windows import EvalSet

log = logging.getLogger(__name__)
REFERENCE = "adapter"
Progress = Callable[[int, int, str], None]
Stream = Literal["auto", "always", "never"]


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
        return self.canaries.result({v: canaries.load_answers(file) for v, file in self.asked.items()})

    def load(self) -> dict[str, dict[str, TokenScores]]:
        """Everything, {set: {variant: scores}}; raises StageError for a damaged file, which is removed."""
        return {s.name: {v: self.read(self.file(v, s)) for v in self.keys} for s in self.sets}

    @staticmethod
    def read(file: Path) -> TokenScores:
        from requant_eval.errors import EvaluationError
        from requant_eval.scoring.token_scores import TokenScores

        try:
            return TokenScores.load(file)
        except EvaluationError as error:
            file.unlink(missing_ok=True)
            raise StageError(f"{error}; it was removed, the same command scores it again") from error


def evaluate(
    scores: Scores,
    sources: variants.VariantSources,
    *,
    batch: int,
    stream: Stream = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score and ask what is missing; returns what a report tells of it. Raises StageError for NaN/inf in logits.

    stream: score block by block always, never, or where a variant does not fit on the device. Out of memory halves the
    batch and goes on; with one window left, a resident variant is streamed, unless that is ruled out.
    """
    free_memory(scores.device)  # of what came before: it decides what fits
    work = _Work(scores, sources, batch, stream, progress)
    todo, unanswered = scores.missing(), scores.unanswered()
    ways = {name: work.streams(name, sets) for name, sets in todo.items()}
    work.total = sum(work.steps(sets, name in unanswered, ways[name]) for name, sets in todo.items())
    for name, sets in todo.items():
        work.variant(name, sets, unanswered.get(name), ways[name])
    return {"variants": list(todo), "streamed": work.streamed, "notes": work.notes}


def reference(
    scores: Scores,
    sources: variants.VariantSources,
    samples: Mapping[str, Sequence[Tensor]],
    *,
    batch: int,
    stream: Stream,
) -> Any:
    """The model of the reference, to be asked about these rows int64 [length], with its adapters and without."""
    rows = [row for many in samples.values() for row in many]
    free_memory(scores.device)
    work = _Work(scores, sources, batch, stream, None)
    if not work.streams(REFERENCE, ()):
        return variants.load(REFERENCE, sources, device=scores.device, dtype=scores.dtype)
    model = streamed.Streamed(streamed.walk_of(REFERENCE, sources, device=scores.device, dtype=scores.dtype))
    model.run(rows, batch)
    with model.disable_adapter():
        model.run(rows, batch)
    return model


@dataclass
class _Work:
    """What `evaluate` is in the middle of. steps are windows, and canaries."""

    scores: Scores
    sources: variants.VariantSources
    batch: int
    stream: Stream
    progress: Progress | None
    total: int = 0
    done: int = 0
    streamed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def steps(self, sets: Sequence[EvalSet], asked: bool, streamed: bool) -> int:
        questions = len(self.scores.canaries.items) if self.scores.canaries and asked else 0
        return questions + sum(len(s.windows) for s in sets) * (2 if streamed else 1)

    def streams(self, name: str, sets: Sequence[EvalSet]) -> bool:
        """Whether a variant is scored block by block."""
        tokens = self.batch * max((s.window for s in sets), default=1)
        size = partial(Size.of, name, self.sources)
        return streams(
            name, self.sources, size, stream=self.stream, device=self.scores.device, dtype=self.scores.dtype, tokens=tokens
        )  # fmt: skip

    def variant(self, name: str, sets: Sequence[EvalSet], asked: Path | None, streaming: bool) -> None:
        """Score one variant on its sets and ask it, in one way or, when memory runs out, the other."""
        if self._tried(name, sets, asked, streaming):
            return
        free_memory(self.scores.device)
        if streaming or self.stream == "never" or not streamed.possible(name, self.sources):
            raise StageError(
                f"variant {name}: out of memory on {self.scores.device} with one window at a time: shorten evaluate.window"
                + (", or set evaluate.stream to auto" if self.stream == "never" else "")
            )
        self._note(f"{name}: out of memory with one window at a time, went on block by block")
        left = [s for s in sets if not self.scores.file(name, s).exists()]
        self.total += self.steps(left, False, False)
        if not self._tried(name, left, asked, True):
            raise StageError(f"variant {name}: out of memory on {self.scores.device}, also block by block")

    def _tried(self, name: str, sets: Sequence[EvalSet], asked: Path | None, streaming: bool) -> bool:
        """One way from its start; False when memory ran out."""
        from requant_eval.errors import EvaluationError

        try:
            model, runtime = self._open(name, sets, streaming)
            for s in sets:
                self._scored(name, model, s, runtime)
            if asked is not None:
                _ask(self.scores, model, asked, partial(self._tell, name, self.done))
                self.done += self.steps((), True, False)
            self.notes += [f"{name}: {note}" for note in getattr(model, "notes", [])]
        except EvaluationError as error:
            raise StageError(f"variant {name}: {error}") from error
        except torch.OutOfMemoryError:
            return False
        del model
        free_memory(self.scores.device)
        return True

    def _open(self, name: str, sets: Sequence[EvalSet], streaming: bool) -> tuple[Any, str]:
        """(model, what runs it). Streamed, all windows have gone through its blocks."""
        device, dtype = self.scores.device, self.scores.dtype
        if not streaming:
            return variants.load(name, self.sources, device=device, dtype=dtype), variants.RUNTIMES[name]
        self.streamed.append(name)
        model = streamed.Streamed(streamed.walk_of(name, self.sources, device=device, dtype=dtype))
        windows = [w.ids for s in sets for w in s.windows]

        def tell(done: int, blocks: int) -> None:
            if self.progress:
                self.progress(
                    self.done + len(windows) * done // blocks, self.total, f"{name}, block {done} of {blocks}"
                )

        if windows:
            model.run(windows, self.batch, tell)
        self.done += len(windows)
        return model, streamed.RUNTIMES[name]

    def _scored(self, name: str, model: Any, s: EvalSet, runtime: str) -> None:
        """One set, with ever smaller batches while memory runs out."""
        while not self._fits(name, model, s, runtime):
            free_memory(self.scores.device)
            before = self.batch
            if before == 1:
                raise torch.OutOfMemoryError
            self.batch = -(-before // 2)
            self._note(f"{name} on {s.name}: out of memory with {before} windows at a time, went on with {self.batch}")
        self.done += len(s.windows)

    def _fits(self, name: str, model: Any, s: EvalSet, runtime: str) -> bool:
        try:
            _score(self.scores, name, model, s, self.batch, runtime, partial(self._tell, name, self.done))
        except torch.OutOfMemoryError:
            return False  # the failed forward's memory goes with its frames
        return True

    def _tell(self, name: str, before: int, at: int, what: str) -> None:
        if self.progress:
            self.progress(before + at, self.total, f"{name} on {what}")

    def _note(self, text: str) -> None:
        log.warning("%s", text)
        self.notes.append(text)


def streams(
    name: str,
    sources: variants.VariantSources,
    size: Callable[[], Size],
    *,
    stream: Stream,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
) -> bool:
    """Whether a variant is scored block by block: asked for, needed or impossible. tokens: of a batch. size: what to compare."""
    if stream == "never" or not streamed.possible(name, sources):
        return False
    if stream == "always" or (name in ("base", "adapter") and not sources.live):
        return True
    need, free = size().resident(dtype.itemsize, tokens, CHUNK_LOGITS[device.type]), free_bytes(device)
    if need > USABLE * free:
        log.info("%s takes %.1f GB whole, %.1f GB are free: block by block", name, need / 1e9, free / 1e9)
    return need > USABLE * free


Tell = Callable[[int, str], None]


def _score(scores: Scores, name: str, model: Any, s: EvalSet, batch: int, runtime: str, tell: Tell) -> None:
    """One variant on one set, into its file; the reference's hidden states into theirs."""
    from requant_eval.scoring.score_loop import score

    log.info("scoring %s on %s", name, s.name)
    compared = scores.reference(s) if scores.kl else None
    own = name == REFERENCE
    result = score(
        model, s, batch=batch, device=scores.device, on_progress=lambda at, _: tell(at, s.name),
        reference=None if own else compared, write_reference=compared if own else None,
    )  # fmt: skip
    result.runtime = runtime
    result.save(scores.file(name, s))


def _ask(scores: Scores, model: Any, file: Path, tell: Tell) -> None:
    """One variant's answers to all canaries, into its file."""
    assert scores.canaries is not None
    canaries.save_answers(scores.canaries.ask(model, scores.device, lambda at, _: tell(at, "canaries")), file)
