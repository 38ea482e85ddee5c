"""Comparison of runs on tasks: scores paired by document, where all were asked alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TypedDict

import numpy as np

from requant_eval.metrics import proportions
from requant_eval.metrics.records import Estimate
from requant_eval.metrics.task_metrics import step
from requant_eval.metrics.task_records import TaskSection


class TaskPair(TypedDict):
    """Two runs on one task. difference: score of b minus a. better: a name; None where the interval holds 0."""

    a: str
    b: str
    difference: Estimate
    p: float | None
    better: str | None


class ComparedTask(TypedDict):
    """A task that all runs were asked alike; every run's score on it, and every pair."""

    name: str
    metric: str
    scale: float
    n_documents: int
    scores: dict[str, Estimate]
    pairs: list[TaskPair]


def compared(runs: Mapping[str, tuple[Sequence[TaskSection], str]]) -> tuple[list[ComparedTask], list[str]]:
    """(tasks that all runs share, what was left out and why). runs: name -> (its tasks, its variant)."""
    found = {
        run: {task["name"]: task for task in tasks if variant in task["documents"]}
        for run, (tasks, variant) in runs.items()
    }
    names = list(dict.fromkeys(name for tasks in found.values() for name in tasks))
    shared, left = [], []
    for name in names:
        asked = [tasks[name] for tasks in found.values() if name in tasks]
        if len(asked) < len(runs):
            left.append(f"task {name}")
        elif len({(task["digest"], task["metric"]) for task in asked}) > 1:
            left.append(f"task {name}, which was asked in different ways (documents, few-shot, template or metric)")
        else:
            shared.append(_task(name, {run: found[run][name] for run in runs}, {r: v for r, (_, v) in runs.items()}))
    return shared, left


def _task(name: str, sections: Mapping[str, TaskSection], variants: Mapping[str, str]) -> ComparedTask:
    first = next(iter(sections.values()))
    values = {run: np.asarray(s["documents"][variants[run]], np.float64) for run, s in sections.items()}
    pairs: list[TaskPair] = []
    for a, b in combinations(sections, 2):
        found = step(a, b, values)
        low, high = found["difference"]["low"], found["difference"]["high"]
        larger = b if (low or 0) > 0 else a if (high or 0) < 0 else None
        smaller = None if larger is None else a if larger == b else b
        better = larger if first["higher_is_better"] else smaller
        pairs.append({"a": a, "b": b, "difference": found["difference"], "p": found["p"], "better": better})
    return {
        "name": name,
        "metric": first["metric"],
        "scale": first["scale"],
        "n_documents": first["n_documents"],
        "scores": {run: proportions.score(array).record() for run, array in values.items()},
        "pairs": pairs,
    }
