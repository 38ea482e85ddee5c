"""Tasks on variants, each whole in memory, one after the other; finished tasks are kept.

The result of one task on one variant is a file of the run's cache. Its name depends on all that the result depends on,
so a killed run asks only what is missing.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from requant.checkpoint.atomic_write import read_state, write_text
from requant.checkpoint.reader import read_json
from requant.checkpoint.run_directory import key_of, sealed, unsealed
from requant.errors import MemoryLackError, StageError
from requant.evaluate import task_definitions, task_model, task_values, variants
from requant.evaluate.memory import VariantSize, tried_again_from
from requant.evaluate.stage import should_stream
from requant.evaluate.tasks import LoadedTask, Tasks
from requant.evaluate.trained_base import decoded_once
from requant.modeling import skeleton
from requant.runtime.cuda_graph import capture_on
from requant.runtime.device import free_bytes, free_memory
from requant_eval.scoring.batches import BatchSize
from requant_eval.scoring.score_loop import logit_bytes

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]  # (done, of, note)
Serve = Callable[[Path], AbstractContextManager[task_model.Server]]  # a server that has a checkpoint loaded
TOO_LARGE = "does not fit on the device as a whole, and tasks are not run block by block"
NOT_LIVE = "the base cannot be loaded as training held it"


class TasksResult(TypedDict):
    """What the tasks did, for the report. missing: variant -> why it was not run. notes: e.g. smaller batches.

    again_from: of the missing, free bytes of the device from which a variant is tried again.
    """

    variants: list[str]
    missing: dict[str, str]
    notes: list[str]
    again_from: dict[str, int]


class PartResult(TypedDict):
    """One of the library's tasks on one variant. values: metric -> value of each document.

    by: the server that answered, with its version; absent where our own model did.
    """

    values: dict[str, list[float]]
    documents: int
    seconds: float
    by: NotRequired[str]


@dataclass(frozen=True, kw_only=True)
class TaskScores:
    """The results of a run's tasks, in files of `cache`. keys: variant name -> digest of its sources.

    served: variants that a server answers for in our place -> their checkpoints.
    """

    cache: Path
    tasks: Tasks
    keys: Mapping[str, str]
    device: torch.device
    dtype: torch.dtype
    served: Mapping[str, Path] = field(default_factory=dict)

    def file(self, variant: str, task: LoadedTask, part: int) -> Path:
        """The file of one of the library's tasks on one variant."""
        settings = (self.tasks.tokenizer.made_from, self.tasks.stops, task_definitions.library_version())
        computed = ("served",) if variant in self.served else (str(self.dtype), self.device.type)
        key = key_of(self.keys[variant], task.digests[part], task.code, *settings, *computed)
        return self.cache / f"task-{variant}-{key[:24]}.json"

    @property
    def files(self) -> list[Path]:
        """All of these files."""
        return [self.file(v, task, part) for v in self.keys for task, part in self.parts()]

    @property
    def key(self) -> str:
        """Digest of the names of all results, and of what is compared."""
        return key_of([f.name for f in self.files], [(t.request.title, t.metric) for t in self.tasks.items])

    def parts(self) -> Iterator[tuple[LoadedTask, int]]:
        """Each task of the library, as (task, number of the part)."""
        return ((task, part) for task in self.tasks.items for part in range(len(task.parts)))

    def missing(self, variant: str) -> list[tuple[LoadedTask, int]]:
        """What a variant has no result of."""
        return [(task, part) for task, part in self.parts() if self.read(variant, task, part) is None]

    def read(self, variant: str, task: LoadedTask, part: int) -> PartResult | None:
        """The saved result; None where there is none, or none that can be read."""
        return read_state(self.file(variant, task, part), partial(_part_of, task.metric))

    def save(self, variant: str, task: LoadedTask, part: int, result: PartResult) -> None:
        """Keep a result."""
        write_text(self.file(variant, task, part), json.dumps(sealed(result)) + "\n")


def run_tasks(
    scores: TaskScores,
    sources: variants.VariantSources,
    *,
    batch: BatchSize | int,
    progress: Progress | None = None,
    load: variants.Load | None = None,
    serve: Serve | None = None,
) -> TasksResult:
    """Run every task on every variant, as far as results are missing.

    serve: starts the server of a variant that is served. Another one that does not fit on the device as a whole is left
    out and named. Out of memory halves the batch.
    """
    todo = {name: left for name in scores.keys if (left := scores.missing(name))}
    work = _Work(scores=scores, sources=sources, batch=BatchSize.of(batch), progress=progress, load=load, serve=serve)
    work.total = sum(len(task.parts[part].instances) for left in todo.values() for task, part in left)
    for name, left in todo.items():
        free_memory(scores.device)
        if unfit := _unfit(name, scores, sources):
            log.warning("tasks: %s %s", name, unfit[0])
            work.missing[name] = unfit[0]
            work.again_from |= {} if unfit[1] is None else {name: unfit[1]}
            work.total -= sum(len(task.parts[part].instances) for task, part in left)
        else:
            work.variant(name, left)
    return {"variants": list(todo), "missing": work.missing, "notes": work.notes, "again_from": work.again_from}


def _unfit(name: str, scores: TaskScores, sources: variants.VariantSources) -> tuple[str, int | None] | None:
    """(why a variant cannot be run as a whole, free bytes from which it is tried again); None: it can."""
    if name in scores.served:
        return None
    if name in ("base", "adapter") and not sources.live:
        return NOT_LIVE, None
    size, tokens = cache(partial(VariantSize.of, name, sources)), max(task.longest for task in scores.tasks.items)
    if not should_stream(name, sources, size, stream="auto", device=scores.device, dtype=scores.dtype, tokens=tokens):
        return None
    need = size().resident(scores.dtype.itemsize, tokens, logit_bytes(scores.device.type))
    return TOO_LARGE, tried_again_from(need, free_bytes(scores.device))


@dataclass(kw_only=True)
class _Work:
    """The state of one call of `run_tasks`. total, done: requests."""

    scores: TaskScores
    sources: variants.VariantSources
    batch: BatchSize
    progress: Progress | None
    load: variants.Load | None = None
    serve: Serve | None = None
    total: int = 0
    done: int = 0
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    again_from: dict[str, int] = field(default_factory=dict)

    def variant(self, name: str, left: Sequence[tuple[LoadedTask, int]]) -> None:
        """Run what is left of one variant."""
        self._say(f"loading {name}")
        scores = self.scores
        if name in scores.served:
            assert self.serve is not None, "what is served has a server"
            path = scores.served[name]
            with self.serve(path) as server:
                model = skeleton.open_model(path, trust_remote_code=self.sources.trust_remote_code)
                self._parts(name, model, left, server)
            return
        model = (self.load or variants.load)(name, self.sources, device=scores.device, dtype=scores.dtype)
        with decoded_once(model, scores.device):
            self._parts(name, model, left, None)
        del model
        free_memory(scores.device)

    def _parts(
        self, name: str, model: Any, left: Sequence[tuple[LoadedTask, int]], server: task_model.Server | None
    ) -> None:
        """Run what is left of one variant, on its model or through its server."""
        scores, tasks = self.scores, self.scores.tasks
        for task, part in left:
            log.info("tasks: %s on %s, %s", name, task.request.title, task.parts[part].task_name)
            answered = partial(self._answered, f"{name} on {task.request.title}")
            wrapped = task_model.wrapped(
                model, tasks.tokenizer, window=tasks.window, batch=self._rows(task, part), stops=tasks.stops,
                on_request=answered, server=server, capture=capture_on(scores.device),
            )  # fmt: skip
            found = self._run(name, wrapped, task, part)
            scores.save(name, task, part, found | {"by": server.described} if server else found)

    def _run(self, name: str, model: Any, task: LoadedTask, part: int) -> PartResult:
        """One of the library's tasks; out of memory halves the batch."""
        own, begun, before = task.parts[part], time.perf_counter(), self.done
        what = f"variant {name}: task {task.request.title}: lm-evaluation-harness failed"
        while True:
            torch.manual_seed(task_values.SEED)
            try:
                values, documents = task_values.evaluated(
                    own, model, limit=task.request.limit, chat=task.request.chat, what=what
                )
                break
            except torch.OutOfMemoryError:
                if model.batch_size_per_gpu == 1:
                    raise MemoryLackError(f"{what}: out of memory with one request at a time") from None
            self.done = before
            free_memory(self.scores.device)
            model.batch_size_per_gpu //= 2
            self.notes.append(f"{name} on {task.request.title}: out of memory, {model.batch_size_per_gpu} at a time")
        if task.metric not in values:
            raise StageError(f"{what}: it gave no {task.metric} for some documents: compare another metric")
        if task_values.digest_of(own) != task.digests[part]:
            raise StageError(f"{what}: it asked other questions than before: its data or its order is not fixed")
        return {"values": values, "documents": documents, "seconds": time.perf_counter() - begun}

    def _rows(self, task: LoadedTask, part: int) -> int:
        """Requests at a time: as many as scoring has tokens for and whose logits fit; answers need a token's."""
        longest = max(task.longest, 1)
        positions = 1 if task.parts[part].OUTPUT_TYPE == "generate_until" else longest
        most = max(1, logit_bytes(self.scores.device.type) // (8 * len(self.scores.tasks.tokenizer) * positions))
        return min(self.batch.rows(longest), most)

    def _answered(self, note: str) -> None:
        self.done += 1
        self._say(note)

    def _say(self, note: str) -> None:
        if self.progress:
            self.progress(min(self.done, self.total), self.total, note)


def _part_of(metric: str, file: Path) -> PartResult:
    """The result in a file; ValueError where it holds something else."""
    found: Any = unsealed(read_json(file))
    values = found.get("values")
    if not isinstance(values, dict) or len(values.get(metric, ())) != found.get("documents"):
        raise ValueError(f"it holds no {metric} of each document")
    part: PartResult = {"values": values, "documents": found["documents"], "seconds": found["seconds"]}
    if "by" in found:
        part["by"] = str(found["by"])
    return part
