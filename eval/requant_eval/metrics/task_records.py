"""What a task's section of `report.json` contains: the parts of its JSON Schema.

Docstrings are descriptions in the schema.
"""

from __future__ import annotations

from typing_extensions import TypedDict

from requant_eval.metrics.records import Estimate


class TaskVariant(TypedDict):
    """One variant on one task. others: the task's other metrics. seconds: of running it."""

    name: str
    score: Estimate
    others: dict[str, Estimate]
    seconds: float


TaskStep = TypedDict(
    "TaskStep",
    {
        "from": str,
        "to": str,
        "difference": Estimate,
        "became_wrong": int | None,
        "became_right": int | None,
        "p": float | None,
    },
)
TaskStep.__doc__ = (
    "One step, paired by document. difference: of the score. p: McNemar's exact test; null where documents are not "
    "simply right or wrong."
)


class TaskFacts(TypedDict):
    """What a task asks, of whom. task: its name in lm-evaluation-harness. metric: what is compared and gated.

    digest: of all requests and of the way they are judged. missing: variant -> why it was not run.
    """

    name: str
    task: str
    digest: str
    version: str
    kind: str
    few_shot: int
    limit: int | None
    chat: bool
    metric: str
    higher_is_better: bool
    n_documents: int
    missing: dict[str, str]


class TaskSection(TaskFacts):
    """One task of lm-evaluation-harness. digest: of all requests and of the way they are judged.

    scale: what a score is multiplied by to be shown, 100 of shares. missing: variant -> why it was not run.
    documents: the score of each document by variant, what `compare` pairs.
    """

    scale: float
    reference: str | None
    variants: list[TaskVariant]
    steps: list[TaskStep]
    documents: dict[str, list[float]]
