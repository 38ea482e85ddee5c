"""What a task gives for each document: which metrics can be paired, and their values.

A metric can be paired where a document has a value of its own and the score is their mean.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from requant.checkpoint.run_directory import key_of
from requant.errors import InputError, StageError, library_call
from requant.evaluate.task_definitions import TaskRequest

SEED = 1234  # of the examples that are shown, the library's own
REHEARSED = 100  # documents whose right answers are judged before any model's


def metrics_of(task: Any) -> list[str]:
    """The metrics whose value is a mean over documents, "acc" or "exact_match,strict-match", in the task's order."""
    from lm_eval.api.metrics import mean

    filters = [str(item["name"]) for item in task.get_config("filter_list") or ()] or ["none"]
    means = [n for n, how in task.aggregation().items() if how is mean or getattr(how, "__name__", "") == "mean"]
    return [metric_key(name, kind) for name in means for kind in filters]


def metric_key(metric: str, kind: str) -> str:
    """A metric's name in the report. kind: the filter that its answers went through."""
    return metric if kind == "none" else f"{metric},{kind}"


def main_metric(request: TaskRequest, tasks: Sequence[Any]) -> tuple[str, bool]:
    """(the metric that is compared, whether more of it is better), which every task of a group has."""
    known = [name for name in metrics_of(tasks[0]) if all(name in metrics_of(t) for t in tasks)]
    where = f"{request.place}: task {request.title}"
    if not known:
        computed = ", ".join(tasks[0].aggregation()) or "none"
        raise InputError(
            f"{where}: no document has a value of its own: its metrics ({computed}) are computed over all documents at "
            "once, or differ within the group, and cannot be paired"
        )
    wanted = request.metric
    chosen = next((n for n in known if wanted in (None, n, n.partition(",")[0])), None)
    if chosen is None:
        raise InputError(f"{where}: has no metric {wanted!r:.60}: {', '.join(known)}")
    sides = {task.higher_is_better().get(chosen.partition(",")[0]) for task in tasks}
    if len(sides) > 1 or None in sides:
        raise InputError(f"{where}: does not say whether more {chosen} is better: give its metric higher_is_better")
    return chosen, bool(sides.pop())


def digest_of(task: Any) -> str:
    """Digest of all that a task asks and how it judges the answers, of its built requests."""
    asked = [[i.request_type, i.doc_id, i.idx, json.dumps([i.args, i.doc], default=str)] for i in task.instances]
    config = {k: v for k, v in task.dump_config().items() if k not in ("metadata", "dataset_kwargs", "task", "tag")}
    return key_of(asked, json.dumps(config, default=_stable), task.VERSION)


def _stable(value: Any) -> str:
    """A value of a configuration by its name: addresses change."""
    return getattr(value, "__name__", None) or type(value).__name__


def labels_of_no_choice(task: Any) -> list[tuple[int, Any, int]]:
    """(document, its label, its number of choices) where the library would count every choice as wrong.

    Of built requests of a task of choices that the library itself judges.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or task.get_config("process_results") is not None:
        return []
    found = []
    for number, row in {i.doc_id: i.doc for i in task.instances}.items():
        label = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
        choices = task.doc_to_choice(row)
        if not _is_choice(label, choices, several=bool(task.multiple_target)):
            found.append((number, label, len(choices)))
    return found


def _is_choice(label: Any, choices: Sequence[str], *, several: bool) -> bool:
    """Whether the library finds a label among the choices. several: it takes a list of numbers, else one or a text."""
    numbers = range(len(choices))
    if isinstance(label, list):
        return several and all(isinstance(one, int) for one in label) and any(one in numbers for one in label)
    return not several and label in (choices if isinstance(label, str) else numbers)


def rehearse(task: Any) -> None:
    """Judge the right answers of some documents: the library's filters and metrics fail here as they would later.

    Of built requests. A task that judges by code of its own has its filters run alone, as it may take no right answer.
    """
    documents: dict[int, list[Any]] = {}
    for instance in task.instances:
        documents.setdefault(instance.doc_id, []).append(copy.copy(instance))
    some = list(documents.values())[:: -(-len(documents) // REHEARSED)]
    for instances in some:
        for instance in instances:
            instance.resps, instance.filtered_resps = [_right_answer(task, instance)], {}
    for ensemble in task._filters:
        ensemble.apply([instance for instances in some for instance in instances])
    for instances in some if task.get_config("process_results") is None else ():
        for kind in instances[0].filtered_resps:
            task.process_results(instances[0].doc, [i.filtered_resps[kind] for i in instances])


def _right_answer(task: Any, instance: Any) -> Any:
    """What a model would return for a request, were it right; of likelihoods any."""
    if instance.request_type == "loglikelihood_rolling":
        return -1.0
    if instance.request_type == "loglikelihood":
        return -1.0, False
    target = task.doc_to_target(instance.doc)
    return str(target[0] if isinstance(target, list) and target else target)


def evaluated(task: Any, model: Any, *, limit: int | None, chat: bool, what: str) -> tuple[dict[str, list[float]], int]:
    """(metric -> the value of each document, documents) of one task on one model of the library."""
    from lm_eval.evaluator import evaluate

    task.set_fewshot_seed(SEED)
    with library_call(what, kind=StageError, passing=(torch.OutOfMemoryError,)):
        found = evaluate(
            lm=model, task_dict={"tasks": {task.task_name: task}}, limit=limit, bootstrap_iters=0,
            apply_chat_template=chat, fewshot_as_multiturn=chat, log_samples=True,
        )  # fmt: skip
    samples: Sequence[Mapping[str, Any]] = found["samples"][task.task_name]
    return _values(samples, metrics_of(task)), len({sample["doc_id"] for sample in samples})


def _values(samples: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> dict[str, list[float]]:
    """Metric -> value of each document, in the documents' order."""
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    found: dict[str, list[float]] = {metric: [] for metric in metrics}
    for sample in ordered:
        for name in sample["metrics"]:
            key = metric_key(name, str(sample["filter"]))
            if key in found:
                found[key].append(float(sample[name]))
    documents = len({sample["doc_id"] for sample in samples})
    wrong = next((metric for metric, values in found.items() if not all(map(math.isfinite, values))), None)
    if wrong is not None:
        raise StageError(f"a task gave {wrong} that is no number: the checkpoint is damaged or overflows")
    return {metric: values for metric, values in found.items() if len(values) == documents}
