"""JSON Schema of `report.json`, and loading reports of this and older versions.

The classes are the schema. Sections that a run may lack are optional, and unknown keys are allowed: `facts` is free.
Numbers are null where nothing is known; the unit is in the key's comment.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from requant_eval.errors import EvaluationError
from requant_eval.gate import Control, Side
from requant_eval.report.assemble import SCHEMA_VERSION, conclude
from requant_eval.report.verdict import saved_gates

OPEN = ConfigDict(extra="allow", strict=True)
SHOWN = 5  # problems named in one message
Status = Literal["pass", "fail", "inconclusive"]


@with_config(OPEN)
class Estimate(TypedDict):
    """A value, its standard error and its 95 % interval in one unit."""

    value: float | None
    se: float | None
    low: float | None
    high: float | None


@with_config(OPEN)
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


@with_config(OPEN)
class Verdict(TypedDict):
    """What all gates say together; `line` is the first line of every rendering."""

    status: Literal["pass", "fail", "inconclusive", "none"]
    line: str
    more_documents: int | None


@with_config(OPEN)
class Option(TypedDict):
    """One way to deploy. bytes: weights, in files and in memory. loss: percent more perplexity, by set."""

    name: Literal["requantized", "merged", "separate"]
    variant: str | None
    status: Literal["pass", "fail", "inconclusive"] | None
    bytes: int | None
    needs: str
    multi_adapter: str
    loss: dict[str, Estimate | None]
    tokens_per_second: Any


@with_config(OPEN)
class Recommendation(TypedDict):
    """Which way to deploy. adapters_from: number of adapters from which keeping them apart takes less memory."""

    choice: Literal["requantized", "merged", "separate"] | None
    text: str
    rule: str
    options: list[Option]
    adapters_from: int | None


@with_config(OPEN)
class VariantResult(TypedDict):
    """One variant on one set. mean_nll: nats a token. top1_accuracy: a share. seconds: scoring."""

    name: str
    n: int
    mean_nll: Estimate
    ppl: Estimate
    bits_per_byte: Estimate | None
    top1_accuracy: Estimate
    seconds: float


@with_config(OPEN)
class Ladder(TypedDict):
    """KL(reference || variant), nats a token."""

    mean: Estimate
    median: float
    p90: float
    p95: float
    p99: float
    p99_9: float
    max: float


Edge = TypedDict(
    "Edge",
    {
        "from": str,
        "to": str,
        "kind": Literal["learned", "merge", "quantize", "heal", "total", "control", "fork"],
        "delta": Estimate,
        "loss_percent": Estimate,
        "naive_se": float | None,
        "design_effect": float | None,
        "kl": Ladder | None,
        "agreement": Estimate | None,
        "right_to_wrong": Estimate,
        "wrong_to_right": Estimate,
    },
)
Edge.__doc__ = "One step, paired. delta: ln perplexity, nats a token. agreement and flips: shares of tokens."
with_config(OPEN)(Edge)


KernelStep = TypedDict(
    "KernelStep",
    {
        "from": str,
        "to": str,
        "kind": Literal["kernel"],
        "delta": Estimate,
        "loss_percent": Estimate,
        "n_documents": int,
        "n_tokens": int,
        "dtype": str,
        "device": str,
    },
)
KernelStep.__doc__ = "The step into an engine that serves the checkpoint, paired on the beginnings of some documents."
with_config(OPEN)(KernelStep)


@with_config(OPEN)
class Group(TypedDict):
    """Tokens that the adapter changed about as much: low..high is |ln p_adapter - ln p_base|, nats."""

    n: int
    low: float
    high: float


@with_config(OPEN)
class VariantTails(TypedDict):
    """reverted: share of the adapter's changes taken back. last_share: of the loss, what is in the last group. The rest
    by group: nats a token, a share.
    """

    reverted: Estimate | None
    last_share: Estimate | None
    loss: list[Estimate]
    kl: list[Estimate] | None
    disagreement: list[Estimate] | None


@with_config(OPEN)
class Tails(TypedDict):
    """Groups of tokens, least changed by the adapter first, and every variant on them."""

    groups: list[Group]
    variants: dict[str, VariantTails]


@with_config(OPEN)
class Documents(TypedDict):
    """Sums over each document of one variant's tokens: what `compare` pairs. nll, kl: nats; the rest: counts."""

    n: list[int]
    nll: list[float]
    top1: NotRequired[list[int]]
    kl: NotRequired[list[float]]
    agree: NotRequired[list[int]]
    right_to_wrong: NotRequired[list[int]]
    wrong_to_right: NotRequired[list[int]]


@with_config(OPEN)
class EvaluationSet(TypedDict):
    """One evaluation set. digest: sha256 of its token ids; fingerprint: with the protocol."""

    name: str
    digest: str
    protocol: str
    window: int
    bos: bool
    n_documents: int
    n_scored: int
    n_bytes: int
    dropped: int
    in_domain: bool
    fingerprint: str
    few_documents: bool
    reference: str | None
    variants: list[VariantResult]
    edges: list[Edge]
    kernels: NotRequired[list[KernelStep]]
    retention: dict[str, Estimate | None]
    tails: Tails | None
    documents: dict[str, Documents]


@with_config(OPEN)
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


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `report.json`."""
    schema = TypeAdapter(Report).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "requant report"}


def load(path: Path) -> dict[str, Any]:
    """A report file, or the `report.json` of a run directory, as this version's dict.

    Raises:
        EvaluationError: no such file, not JSON, not a report, or one of a newer version.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"{file}: cannot be read ({error.strerror}): name a report.json or a run") from error
    except ValueError as error:
        raise EvaluationError(f"{file}: not JSON ({error}): name a report.json that requant wrote") from error
    try:
        return upgrade(report)
    except EvaluationError as error:
        raise EvaluationError(f"{file}: {error}") from error


def upgrade(report: Any) -> dict[str, Any]:
    """A report of this or an older schema version as one of this version.

    Raises:
        EvaluationError: not a report, or one of a newer version.
    """
    version = report.get("schema_version") if isinstance(report, Mapping) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise EvaluationError("not a report of requant: schema_version is missing; run `requant report RECIPE`")
    if version > SCHEMA_VERSION:
        raise EvaluationError(f"schema version {version}, this requant reads up to {SCHEMA_VERSION}: upgrade requant")
    if version == 1:
        report = _from_1(report)
    check(report)
    return dict(report)


def check(report: Any) -> None:
    """Validates a report against this version's schema.

    Raises:
        EvaluationError: the report does not match; the message names the places.
    """
    try:
        TypeAdapter(Report).validate_python(report)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'report'}: {e['msg']}" for e in error.errors()]
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise EvaluationError(f"does not match the schema: {'; '.join(problems[:SHOWN])}{more}") from error


def _from_1(report: Mapping[str, Any]) -> dict[str, Any]:
    """Version 1 had no gates and no tails; the verdict is computed from its numbers."""
    filled = dict(report) | {"schema_version": SCHEMA_VERSION, "gates": []}
    try:
        filled["sets"] = [dict(s) | {"tails": None} for s in report["sets"]]
        return conclude(filled, saved_gates(filled))
    except (KeyError, TypeError, IndexError) as error:
        raise EvaluationError(f"schema version 1, but {error!r} is missing or damaged") from error
