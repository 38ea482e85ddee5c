"""What `report.json` contains: the parts of its JSON Schema; sets are in `metrics.records`.

Docstrings are descriptions in the schema: their bytes are part of `requant schema --report` and do not change. Unknown keys
are allowed: `facts` is free. Numbers are null where nothing is known.
"""

from __future__ import annotations

from typing import Any, Literal

from typing_extensions import TypedDict

from requant_eval.gate import Control, Side
from requant_eval.metrics.records import Estimate, EvaluationSet

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
    facts: dict[str, Any]
    warnings: list[str]


class ModuleRow(TypedDict, total=False):
    """One quantized module in `facts`; a value that was not measured is missing or None.

    The schema does not describe it. Values, with E the quantization error, dW the adapter's delta, H the Hessian:

    loss: tr(E H E'). relative_error: sqrt(tr(E H E') / tr(W H W')). rtn_error: the same of rounding to nearest.
    signal: tr(dW H dW'). signal_to_noise: signal / loss. retention, output_retention: of the delta and its output.
    """

    name: str
    bits: int
    group_size: int
    loss: float
    relative_error: float | None
    rtn_error: float | None
    damp: float
    fallback: bool
    signal: float | None
    signal_to_noise: float | None
    retention: float | None
    output_retention: float | None
    delta_norm: float
