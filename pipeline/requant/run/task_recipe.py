"""Tasks as a recipe asks for them: what is asked, of which variants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from requant.checkpoint import model_files
from requant.deploy import engine_processes
from requant.errors import InputError
from requant.evaluate import tasks
from requant.evaluate.task_definitions import TaskRequest
from requant.evaluate.tasks import Tasks
from requant.merge.plan import MergePlan
from requant.merge.stop_tokens import StopTokens
from requant.modeling import skeleton
from requant.recipe import Recipe

WINDOW = 2048  # tokens, of a model that does not say how many positions it has


def requests(recipe: Recipe) -> list[TaskRequest]:
    """The tasks of a recipe, with their places in it."""
    return [
        TaskRequest(
            title=task.title,
            name=task.name,
            path=task.resolve(recipe.directory),
            limit=task.limit,
            few_shot=task.few_shot,
            chat=task.chat,
            metric=task.metric,
            place=recipe.place("evaluate", "tasks", number),
        )
        for number, task in enumerate(recipe.evaluate.tasks)
    ]


def servers(recipe: Recipe) -> dict[str, str]:
    """The servers that must load the result -> the place in the recipe that says so.

    Those of `deploy`, and vLLM where tasks run through it.
    """
    through = recipe.evaluate.tasks and recipe.evaluate.task_backend == "vllm"
    asked = {"vllm": recipe.place("evaluate", "task_backend")} if through else {}
    return asked | dict.fromkeys(recipe.deploy, recipe.place("deploy"))


def served(recipe: Recipe) -> tuple[str, ...]:
    """The variants that vLLM answers for: those that are files which it loads."""
    return ("merged", "gptq", "healed") if recipe.evaluate.task_backend == "vllm" else ()


def load_tasks(
    recipe: Recipe, tokenizer: Any, model: Any, plan: MergePlan, stops: StopTokens | None, doing: Callable[[str], None]
) -> Tasks | None:
    """The tasks, built and checked; None without any."""
    asked = requests(recipe)
    if not asked:
        return None
    if recipe.evaluate.task_backend == "vllm":
        try:
            engine_processes.require("vllm")
        except InputError as error:
            raise InputError(f"{recipe.place('evaluate', 'task_backend')}: {error}") from error
    return tasks.load(
        asked,
        tokenizer,
        window=skeleton.positions(model.config) or WINDOW,
        stops=stop_ids(plan, stops, tokenizer),
        trust_remote_code=recipe.trust_remote_code,
        doing=doing,
    )


def stop_ids(plan: MergePlan, stops: StopTokens | None, tokenizer: Any) -> tuple[int, ...]:
    """The token ids that servers stop at, as the merged checkpoint says."""
    if stops is not None:
        return stops.generation
    base = plan.base.checkpoint
    for config in (model_files.generation_config(base.path) or {}, base.config, base.config.get("text_config") or {}):
        found = config.get("eos_token_id")
        ids = [found] if isinstance(found, int) else found if isinstance(found, list) else []
        if ids:
            return tuple(i for i in ids if isinstance(i, int))
    return (tokenizer.eos_token_id,)
