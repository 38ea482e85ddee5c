"""Tables of the tasks: scores, what changed against the reference, other metrics."""

from __future__ import annotations

from requant_eval.metrics.task_records import TaskSection, TaskStep
from requant_eval.render.tables import Table
from requant_eval.report.number_format import format_estimate
from requant_eval.report.records import Report

SHORT = ("task, variant", "score", "points")
NOTE = (
    "Points: score against that of {0}, paired by document; brackets are 95 % intervals. p: McNemar's exact test, "
    "whether as many documents became wrong as became right."
)


def task_tables(report: Report) -> list[Table]:
    """Scores of all tasks, their other metrics, and how each was asked; empty ones left out."""
    tasks = report.get("tasks") or []
    found = (_scores(tasks), _other_metrics(tasks), _settings(tasks))
    return [table for table in found if table.rows]


def _scores(tasks: list[TaskSection]) -> Table:
    rows = [row for task in tasks for row in _rows(task)]
    references = dict.fromkeys(str(task["reference"]) for task in tasks if task["reference"])
    columns = (*SHORT, "became wrong", "became right", "p")
    note = NOTE.format(" or ".join(references) or "a reference")
    return Table(title="Tasks", columns=columns, rows=tuple(rows), note=note)


def _rows(task: TaskSection) -> list[tuple[str, ...]]:
    """One row a variant, and one for each that was not run."""
    rows: list[tuple[str, ...]] = []
    for v in task["variants"]:
        step = next((t for t in task["steps"] if t["to"] == v["name"]), None)
        score = format_estimate(v["score"], factor=task["scale"])
        rows.append((f"{task['name']}: {v['name']}", score, *_change(task, v["name"], step)))
    rows += [(f"{task['name']}: {name}", f"not run: {why}", *[""] * 4) for name, why in task["missing"].items()]
    return rows


def _change(task: TaskSection, name: str, step: TaskStep | None) -> tuple[str, str, str, str]:
    """Points, documents that became wrong and right, McNemar's p."""
    if step is None:
        return "the reference" if name == task["reference"] else "", "", "", ""
    points = format_estimate(step["difference"], factor=task["scale"], signed=True)
    worse, better = (
        "" if count is None else f"{count} of {task['n_documents']}"
        for count in (step["became_wrong"], step["became_right"])
    )
    return points, worse, better, "" if step["p"] is None else f"{step['p']:.2g}"


def _other_metrics(tasks: list[TaskSection]) -> Table:
    """The metrics that are neither compared nor gated."""
    rows = tuple(
        (f"{task['name']}: {v['name']}", format_estimate(found, factor=_factor(found["value"], task)), metric)
        for task in tasks
        for v in task["variants"]
        for metric, found in v["others"].items()
    )
    return Table(
        title="Other metrics of the tasks", columns=("task, variant", "score", "metric"), rows=rows, words=("metric",)
    )


def _factor(value: float | None, task: TaskSection) -> float:
    return task["scale"] if value is not None and 0 <= value <= 1 else 1.0


def _settings(tasks: list[TaskSection]) -> Table:
    """How each task was asked."""
    rows = tuple(
        (
            task["name"],
            task["metric"] + ("" if task["higher_is_better"] else " (lower is better)"),
            f"{task['few_shot']}-shot{', through the chat template' if task['chat'] else ''}",
            str(task["n_documents"]) + (f" (limit {task['limit']})" if task["limit"] else ""),
            task["digest"][:12],
        )
        for task in tasks
    )
    of = (f"{task['name']}: {task['task']}, version {task['version']}, {task['kind']}" for task in tasks)
    columns = ("task", "metric", "asked", "documents", "digest")
    note = f"Of lm-evaluation-harness; {'; '.join(of)}."
    return Table(title="How the tasks were asked", columns=columns, rows=rows, text=5, note=note)
