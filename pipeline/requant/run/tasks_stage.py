"""Stage tasks of a run: lm-evaluation-harness on adapter, merged, what ships and roads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from requant.deploy.task_server import VllmServer
from requant.errors import InputError, MemoryLackError, StageError
from requant.evaluate import task_definitions
from requant.evaluate.roads import ROADS, RoadLoader
from requant.evaluate.task_stage import TaskScores, TasksResult, run_tasks
from requant.outgoing import shared
from requant.run import roads_stage, task_recipe
from requant.run.context import RunContext
from requant.run.evaluate_stage import OF_MERGED

if TYPE_CHECKING:
    from requant_eval.metrics.task_metrics import TaskResult
    from requant_eval.metrics.task_records import TaskFacts


def scores_of(context: RunContext) -> TaskScores:
    """The results of this run's tasks."""
    prepared, roads = context.prepared, {}
    if context.recipe.evaluate.task_variants == "auto":
        roads = roads_stage.measured(context)
    assert prepared.tasks is not None, "the stage is part of a run only with tasks"
    return TaskScores(
        cache=context.directory.cache,
        tasks=prepared.tasks,
        keys={name: context.keys.variants[name] for name in prepared.task_variants} | roads,
        device=context.device,
        dtype=context.scores.dtype,
        served=served(context),
    )


def served(context: RunContext) -> dict[str, Path]:
    """Variant -> its checkpoint, of those that tasks ask through vLLM: the variants that are files which it loads."""
    of, names = context.variant_sources, task_recipe.served(context.recipe)
    files = {"merged": of.merged, "gptq": of.gptq, "healed": of.healed}
    asked = context.prepared.task_variants
    return {name: path for name, path in files.items() if path is not None and name in names and name in asked}


def tasks_key(context: RunContext) -> str:
    """Digest of all that the results depend on."""
    return scores_of(context).key


def are_finished(context: RunContext, key: str) -> bool:
    """Whether every variant has its results, but for those that do not fit on this device."""
    stored = context.directory.result("tasks", key)
    if stored is None:
        return False
    scores, again = scores_of(context), stored.get("again_from", {})
    unfit = {name for name in stored["missing"] if not (name in again and again[name] <= context.scores.free)}
    return not any(scores.missing(variant) for variant in scores.keys if variant not in unfit)


def tasks_need(context: RunContext) -> tuple[str, ...]:
    """The checkpoints that variants and roads without results are made from."""
    if context.prepared.tasks is None:
        return ()
    scores = scores_of(context)
    left = {name for name in scores.keys if scores.missing(name)}
    return tuple(dict.fromkeys([*(["merge"] if left & OF_MERGED else []), *roads_stage.needed(context, left)]))


def run_tasks_stage(context: RunContext, key: str) -> TasksResult:
    """Run what has no results yet, on the first rank."""
    scores, load = scores_of(context), roads_stage.loader(context)
    own = [name for name in scores.keys if name not in ROADS]
    result = _run(context, scores, own, load)
    for name in (name for name in scores.keys if name in ROADS):
        try:
            found = _run(context, scores, [name], load)
        except (StageError, InputError) as error:  # what its library cannot do is no error of the run
            again = {name: 0} if isinstance(error, MemoryLackError) else {}
            found = {
                "variants": [], "missing": {name: f"could not be run: {error}"}, "notes": [], "again_from": again,
            }  # fmt: skip
            context.watcher.warn(f"tasks: {name} {found['missing'][name]}")
        result["variants"] += found["variants"]
        result["missing"] |= found["missing"]
        result["notes"] += found["notes"]
        result["again_from"] |= found["again_from"]
    return result


def _run(context: RunContext, scores: TaskScores, names: Sequence[str], load: RoadLoader) -> TasksResult:
    """Run what some of the variants have no results of."""
    some = replace(scores, keys={name: scores.keys[name] for name in names})
    serve = partial(
        VllmServer, device=context.device, longest=max(task.longest for task in scores.tasks.items),
        trust_remote_code=context.recipe.trust_remote_code,
    )  # fmt: skip
    return run_tasks(
        some, context.variant_sources, batch=context.batch, progress=context.watcher.progress, load=load, serve=serve
    )


def results(context: RunContext) -> list[TaskResult]:
    """Every task with the values of its documents, for the report."""
    from requant_eval.metrics.task_metrics import TaskResult

    if context.prepared.tasks is None:
        return []
    scores = scores_of(context)
    stored = context.directory.result("tasks", scores.key) or {}
    found = []
    for task in scores.tasks.items:
        values: dict[str, dict[str, list[float]]] = {}
        by: list[str] = []
        seconds: dict[str, float] = {}
        for variant in scores.keys:
            parts = [scores.read(variant, task, part) for part in range(len(task.parts))]
            if all(parts):
                whole = [part for part in parts if part is not None]
                metrics = [m for m in whole[0]["values"] if all(m in part["values"] for part in whole)]
                values[variant] = {m: [v for part in whole for v in part["values"][m]] for m in metrics}
                seconds[variant] = sum(part["seconds"] for part in whole)
                by += [f"; {variant} in {whole[0]['by']}"] if "by" in whole[0] else []
        first = task.parts[0]
        facts: TaskFacts = {
            "name": shared(task.request.title),
            "task": str(first.task_name if task.request.path or len(task.parts) == 1 else task.request.name),
            "digest": task.digest,
            "version": f"{first.VERSION} (lm-eval {task_definitions.library_version()}{''.join(by)})",
            "kind": str(first.OUTPUT_TYPE),
            "few_shot": int(first.get_config("num_fewshot") or 0),
            "limit": task.request.limit,
            "chat": task.request.chat,
            "metric": task.metric,
            "higher_is_better": task.higher_is_better,
            "n_documents": task.documents,
            "missing": stored.get("missing", {}),
        }
        found.append(TaskResult(facts=facts, values=values, seconds=seconds))
    return found
