"""What `report.json` contains: the parts of its JSON Schema; sets are in `metrics.records`.

Docstrings are descriptions in the schema: their bytes are part of `requant schema --report` and do not change.
Unknown keys are allowed: `facts` is free. Numbers are null where nothing is known.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from requant_eval.gate import Control, Side
from requant_eval.metrics.answer_records import AnswersSection
from requant_eval.metrics.records import Estimate, EvaluationSet
from requant_eval.metrics.task_records import TaskSection

Status = Literal["pass", "fail", "inconclusive"]
Choice = Literal["requantized", "merged", "separate"]


class GateResult(TypedDict):
    """A rule and how it stands. limit, estimate: in `unit`; relative_to: both are percent of the control's."""

    metric: str
    set: str
    limit: float
    relative_to: Control | None
    side: Side
    unit: str
    variant: str | None
    estimate: Estimate | None
    status: Status
    more_documents: int | None
    text: str


class Verdict(TypedDict):
    """What all gates say together; `line` is the first line of every rendering."""

    status: Literal["pass", "fail", "inconclusive", "none"]
    line: str
    more_documents: int | None


class Option(TypedDict):
    """One way to deploy. bytes: weights, in files and in memory. loss: percent more perplexity, by set."""

    name: Choice
    variant: str | None
    status: Status | None
    bytes: int | None
    needs: str
    multi_adapter: str
    loss: dict[str, Estimate | None]
    tokens_per_second: Any


class Recommendation(TypedDict):
    """Which way to deploy. adapters_from: number of adapters from which keeping them apart takes less memory."""

    choice: Choice | None
    text: str
    rule: str
    options: list[Option]
    adapters_from: int | None


class Road(TypedDict):
    """One way to ship the fine-tune, this run's own among them. variant: as it was scored, null: it was not (missing
    says why). ships: it is what this run deploys. by: who computed it. bytes: of the tensors on disk; unquantized: of
    these in 16 bit. By set, against the reference: loss: percent more perplexity; kl: nats a token; times: loss in ln
    perplexity as a multiple of the loss of what ships.
    """

    name: str
    variant: str | None
    ships: bool
    by: str
    settings: str
    bytes: int | None
    unquantized: int | None
    missing: str | None
    loss: dict[str, Estimate | None]
    kl: dict[str, Estimate | None]
    times: dict[str, Estimate | None]


class Report(TypedDict):
    """A requant quality report."""

    schema_version: Literal[2]
    name: str | None
    created: str | None
    verdict: Verdict
    headline: str
    gates: list[GateResult]
    recommendation: Recommendation
    sets: list[EvaluationSet]
    tasks: NotRequired[list[TaskSection]]
    answers: NotRequired[AnswersSection]
    roads: NotRequired[list[Road]]
    facts: dict[str, Any]
    warnings: list[str]


class Numbers(TypedDict):
    """The part of a report that its conclusions (headline, verdict, recommendation) are computed from."""

    sets: list[EvaluationSet]
    tasks: NotRequired[list[TaskSection]]
    answers: NotRequired[AnswersSection]
    facts: dict[str, Any]
