"""Stage evaluate: score every variant on every set; generate its answers.

One variant is in memory at a time, whole or block by block. Finished scores and answers are cached and reused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor

from requant.data import canaries
from requant.errors import MemoryLackError, StageError
from requant.evaluate import peft_runtime, streamed, variants
from requant.evaluate.memory import VariantSize, tried_again_from
from requant.evaluate.scores import REFERENCE, Questions, Scores, score_set
from requant.evaluate.trained_base import decoded_once
from requant.runtime.device import USABLE, free_bytes, free_memory
from requant_eval.scoring.batches import BatchSize, Plan, plan
from requant_eval.scoring.score_loop import logit_bytes

if TYPE_CHECKING:
    from requant_eval.scoring.reference_states import Reference
    from requant_eval.scoring.windows import EvalSet

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]  # (done, of, note)
Answers = Sequence[tuple[Questions, Path]]  # what is to be answered, and the file for it
Stream = Literal["auto", "always", "never"]


class EvaluationResult(TypedDict):
    """What an evaluation did, for the report.

    streamed: variants scored block by block. notes: e.g. smaller batches.
    """

    variants: list[str]
    streamed: list[str]
    notes: list[str]


def evaluate(
    scores: Scores,
    sources: variants.VariantSources,
    *,
    batch: BatchSize | int,
    stream: Stream = "auto",
    progress: Progress | None = None,
    load: variants.Load | None = None,
) -> EvaluationResult:
    """Score every variant and generate its answers, as far as they are missing.

    load: makes a whole model. stream: score block by block always, never, or (auto) where a variant does not fit on the
    device. Out of memory halves the batch; with one window at a time, a resident variant is streamed unless `never`.

    Raises StageError for NaN or infinity in logits.
    """
    free_memory(scores.device)  # of earlier stages: what is free decides what is streamed
    work = _Evaluation(scores=scores, sources=sources, batch=BatchSize.of(batch), stream=stream, progress=progress)
    work.load, work.free = load, free_bytes(scores.device)
    todo, unanswered = scores.missing(), scores.unanswered()
    streaming = {name: work.should_stream(name, sets) for name, sets in todo.items()}
    work.total = sum(
        work.steps(sets, unanswered.get(name, ()), streaming=streaming[name]) for name, sets in todo.items()
    )
    base_follows = list(todo)[:2] == [REFERENCE, "base"] and not (streaming[REFERENCE] or streaming["base"])
    for name in todo:
        work.keeping = base_follows and name == REFERENCE
        work.variant(name, todo[name], unanswered.get(name, ()), streaming=streaming[name])
    return {"variants": list(todo), "streamed": work.streamed, "notes": work.notes}


def load_reference(
    scores: Scores,
    sources: variants.VariantSources,
    samples: Mapping[str, Sequence[Tensor]],
    *,
    batch: BatchSize | int,
    stream: Stream,
) -> Any:
    """The reference's model, whole or streamed.

    samples: rows int64 [length]; a streamed model has run them with its adapters and without.
    """
    rows = [row for many in samples.values() for row in many]
    free_memory(scores.device)
    work = _Evaluation(scores=scores, sources=sources, batch=BatchSize.of(batch), stream=stream, progress=None)
    if not work.should_stream(REFERENCE, ()):
        return variants.load(REFERENCE, sources, device=scores.device, dtype=scores.dtype)
    model = streamed.StreamedModel(streamed.walk_of(REFERENCE, sources, device=scores.device, dtype=scores.dtype))
    model.run(rows, batch)
    with model.disable_adapter():
        model.run(rows, batch)
    return model


@dataclass(kw_only=True)
class _Evaluation:
    """The state of one call of `evaluate`. free: bytes at its start. total, done: steps, which are windows and answers.

    keeping: the variant base follows the adapter's, whose model it is with its adapters off. kept: that model.
    references: set -> hidden states and head of the reference, which all other variants are compared with.
    """

    scores: Scores
    sources: variants.VariantSources
    batch: BatchSize
    stream: Stream
    progress: Progress | None
    load: variants.Load | None = None
    free: int = 0
    total: int = 0
    done: int = 0
    keeping: bool = False
    kept: Any = None
    references: dict[str, Reference] = field(default_factory=dict)
    streamed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def steps(self, sets: Sequence[EvalSet], answers: Answers, *, streaming: bool) -> int:
        """Steps of one variant; streamed, each window counts twice."""
        questions = sum(len(asked.items) for asked, _ in answers)
        return questions + sum(len(s.windows) for s in sets) * (2 if streaming else 1)

    def should_stream(self, name: str, sets: Sequence[EvalSet]) -> bool:
        """Whether a variant is scored block by block."""
        tokens = max((_plan(s, self.batch).tokens for s in sets), default=1)
        return should_stream(
            name,
            self.sources,
            partial(VariantSize.of, name, self.sources),
            stream=self.stream,
            device=self.scores.device,
            dtype=self.scores.dtype,
            tokens=tokens,
        )

    def variant(self, name: str, sets: Sequence[EvalSet], answers: Answers, *, streaming: bool) -> None:
        """Score one variant on its sets and save its answers; out of memory, stream it."""
        if self._completed(name, sets, answers, streaming=streaming):
            return
        free_memory(self.scores.device)
        if streaming or self.stream == "never" or not streamed.can_stream(name, self.sources):
            raise MemoryLackError(
                f"variant {name}: out of memory on {self.scores.device} with one window at a time: shorten "
                "evaluate.window" + (", or set evaluate.stream to auto" if self.stream == "never" else "")
            )
        self._note(f"{name}: out of memory with one window at a time, went on block by block")
        left = [s for s in sets if not self.scores.file(name, s).exists()]
        self.total += self.steps(left, (), streaming=False)
        if not self._completed(name, left, answers, streaming=True):
            raise MemoryLackError(f"variant {name}: out of memory on {self.scores.device}, also block by block")

    def _completed(self, name: str, sets: Sequence[EvalSet], answers: Answers, *, streaming: bool) -> bool:
        """Score one variant whole or streamed; False when memory ran out."""
        from requant_eval.errors import EvaluationError

        kept, self.kept = self.kept, None
        try:
            model, runtime = self._load(name, sets, streaming=streaming, kept=kept)
            with model.disable_adapter() if model is kept else nullcontext():
                for s in sets:
                    self._score(name, model, s, runtime)
                with decoded_once(model, self.scores.device, wanted=bool(answers)):
                    for asked, file in answers:
                        self._answer(name, model, asked, file)
                        self.done += len(asked.items)
            self.notes += [f"{name}: {note}" for note in getattr(model, "notes", [])]
        except EvaluationError as error:
            raise StageError(f"variant {name}: {error}") from error
        except torch.OutOfMemoryError:
            return False
        plan = self.sources.plan
        if self.keeping and not streaming and plan is not None and peft_runtime.leaves_the_base_alone(plan):
            self.kept = model
        del model, kept
        free_memory(self.scores.device)
        return True

    def _load(self, name: str, sets: Sequence[EvalSet], *, streaming: bool, kept: Any) -> tuple[Any, str]:
        """(model, name of its runtime). A streamed model has run all windows through its blocks.

        kept: the model of the variant, where it is in memory.
        """
        device, dtype = self.scores.device, self.scores.dtype
        log.info("loading %s", name)
        if self.progress:
            self.progress(self.done, self.total, f"loading {name}")
        if not streaming:
            whole = variants.RUNTIMES_16_BIT if self.sources.sixteen_bit else variants.RUNTIMES
            load = self.load or variants.load
            model = kept or load(name, self.sources, device=device, dtype=dtype)
            return model, whole[name]
        self.streamed.append(name)
        model = streamed.StreamedModel(streamed.walk_of(name, self.sources, device=device, dtype=dtype))
        windows = [w.ids for s in sets for w in s.windows]

        def on_block(done: int, blocks: int) -> None:
            if self.progress:
                self.progress(
                    self.done + len(windows) * done // blocks, self.total, f"{name}, block {done} of {blocks}"
                )

        if windows:
            model.run(windows, self.batch, on_block)
        self.done += len(windows)
        return model, (streamed.RUNTIMES_16_BIT if self.sources.sixteen_bit else streamed.RUNTIMES)[name]

    def _score(self, name: str, model: Any, s: EvalSet, runtime: str) -> None:
        """Score one set; out of memory halves the batch."""
        while not self._fits_in_memory(name, model, s, runtime):
            self.references.clear()
            free_memory(self.scores.device)
            before = _plan(s, self.batch).largest
            if before == 1:
                raise torch.OutOfMemoryError
            self.batch = self.batch.halved(before)
            after = _plan(s, self.batch).largest
            self._note(f"{name} on {s.name}: out of memory with {before} windows at a time, went on with {after}")
        self.done += len(s.windows)

    def _answer(self, name: str, model: Any, asked: Questions, file: Path) -> None:
        """Write the answers of a variant; a lack of memory leaves prompts of held-out rows unasked, not the run."""
        try:
            answers = asked.ask(
                model, self.scores.device, lambda at, _: self._on_progress(name, self.done, at, asked.kind)
            )
        except torch.OutOfMemoryError:
            if asked.kind != "answers":
                raise
            self._note(f"{name}: out of memory while it answered prompts one by one: not asked")
            answers = []
        again_from = self._again_from(name) if asked.items and not answers else None
        canaries.save_answers(answers, file, again_from=again_from)

    def _again_from(self, name: str) -> int | None:
        """Free bytes from which a variant that was not asked is asked; None: never."""
        if self.stream == "always" or (name in ("base", "adapter") and not self.sources.live):
            return None
        device, item = self.scores.device, self.scores.dtype.itemsize
        need = VariantSize.of(name, self.sources).resident(item, 1, logit_bytes(device.type))
        return tried_again_from(need, max(self.free, self.scores.free))

    def _fits_in_memory(self, name: str, model: Any, s: EvalSet, runtime: str) -> bool:
        try:
            score_set(
                self.scores, name, model, s, self.batch, runtime, self._reference(name, s),
                partial(self._on_progress, name, self.done), lambda note: self._note(f"{name} on {s.name}: {note}"),
            )  # fmt: skip
        except torch.OutOfMemoryError:
            return False  # the failed forward's memory is released with its frames
        return True

    def _reference(self, name: str, s: EvalSet) -> Reference | None:
        """What a variant is compared with on a set, opened once; None: it is the reference, or nothing is compared."""
        from requant_eval.scoring.reference_states import Reference

        if name == REFERENCE or not self.scores.kl:
            return None
        if s.name not in self.references:
            opened = Reference(
                self.scores.reference(s),
                digest=s.digest,
                device=self.scores.device,
                beside=self.references.values(),
            )
            self.references[s.name] = opened
        return self.references[s.name]

    def _on_progress(self, name: str, before: int, at: int, what: str) -> None:
        if self.progress:
            self.progress(before + at, self.total, f"{name} on {what}")

    def _note(self, text: str) -> None:
        log.warning("%s", text)
        self.notes.append(text)


def should_stream(
    name: str,
    sources: variants.VariantSources,
    size: Callable[[], VariantSize],
    *,
    stream: Stream,
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
) -> bool:
    """Whether a variant is scored block by block.

    Always or never, as `stream` says, or (auto) when it takes more memory than is free. size: computes the variant's
    size, called only where it matters. tokens: of a batch.
    """
    if stream == "never" or not streamed.can_stream(name, sources):
        return False
    if stream == "always" or (name in ("base", "adapter") and not sources.live):
        return True
    need, free = size().resident(dtype.itemsize, tokens, logit_bytes(device.type)), free_bytes(device)
    if need > USABLE * free:
        log.info("%s takes %.1f GB whole, %.1f GB are free: block by block", name, need / 1e9, free / 1e9)
    return need > USABLE * free


def _plan(s: EvalSet, size: BatchSize) -> Plan:
    """The batches of a set, whose sizes decide what fits in memory."""
    return plan([len(w.ids) for w in s.windows], size)
