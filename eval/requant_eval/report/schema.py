"""JSON Schema of `report.json`, and loading reports of this and older versions.

The schema is made of the records of `report.records` and `metrics.records`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from requant_eval import strict_json
from requant_eval.errors import EvaluationError
from requant_eval.metrics import answer_records, task_records
from requant_eval.metrics import records as set_records
from requant_eval.metrics.facts import Facts
from requant_eval.report import records as report_records
from requant_eval.report.assemble import SCHEMA_VERSION, conclude
from requant_eval.report.records import Report

OPEN = ConfigDict(extra="allow", strict=True)
SHOWN = 5  # problems named in one message
ENDS: tuple[Literal["from", "to"], ...] = ("from", "to")  # of a step


RECORDS: tuple[Any, ...] = (
    report_records.GateResult,
    report_records.Verdict,
    report_records.Option,
    report_records.Recommendation,
    report_records.Road,
    report_records.Report,
    set_records.Estimate,
    set_records.VariantResult,
    set_records.Ladder,
    set_records.Edge,
    set_records.KernelStep,
    set_records.Group,
    set_records.VariantTails,
    set_records.Tails,
    set_records.Documents,
    set_records.EvaluationSet,
    answer_records.CheckCount,
    answer_records.AnsweringVariant,
    answer_records.AnsweredPrompt,
    answer_records.LostCheck,
    answer_records.AnswersSection,
    task_records.TaskVariant,
    task_records.TaskStep,
    task_records.TaskSection,
)
for _record in RECORDS:
    with_config(OPEN)(_record)


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `report.json`."""
    schema = TypeAdapter(Report).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "requant report"}


def load(path: str | Path) -> Report:
    """A report file, or the `report.json` of a run directory, as this version's dict.

    Raises:
        EvaluationError: no such file, not JSON, not a report, or one of a newer version.
    """
    path = Path(path)
    file = path / "report.json" if path.is_dir() else path
    try:
        report = strict_json.load(file, bom=True)
    except OSError as error:
        raise EvaluationError(f"{file}: cannot be read ({error.strerror}): name a report.json or a run") from error
    except strict_json.JsonError as error:
        raise EvaluationError(f"{file}: {error}: name a report.json that requant wrote") from error
    try:
        return upgrade(report)
    except EvaluationError as error:
        raise EvaluationError(f"{file}: {error}") from error


def upgrade(report: Any) -> Report:
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
    return cast("Report", dict(report))


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
    if problem := next(_unknown_variants(report), None):
        raise EvaluationError(f"does not match the schema: {problem}")


def _unknown_variants(report: Report) -> Iterator[str]:
    """What names a variant that its set has no result of, where and by which name.

    A step into an engine leads to what is no variant: a kernel.
    """
    for number, found in enumerate(report["sets"]):
        known = {v["name"] for v in found["variants"]}
        named = [(f"edges.{i}.{end}", e[end]) for i, e in enumerate(found["edges"]) for end in ENDS]
        named += [(f"kernels.{i}.from", k["from"]) for i, k in enumerate(found.get("kernels") or [])]
        for place, name in named:
            if name not in known:
                yield f"sets.{number}.{place}: {name!r:.60} is no variant of the set"
    scored = {v["name"] for v in report["sets"][0]["variants"]} if report["sets"] else set()
    for number, road in enumerate(report.get("roads") or []):
        if road["variant"] is not None and road["variant"] not in scored:
            yield f"roads.{number}.variant: {road['variant']!r:.60} is no variant of the first set"
    for number, task in enumerate(report.get("tasks") or []):
        run = {v["name"] for v in task["variants"]}
        places = [(f"steps.{i}.{end}", e[end]) for i, e in enumerate(task["steps"]) for end in ENDS]
        for place, name in [*places, *((f"documents.{name}", name) for name in task["documents"])]:
            if name not in run:
                yield f"tasks.{number}.{place}: {name!r:.60} is no variant of the task"
        for name, values in task["documents"].items():
            if len(values) != task["n_documents"]:
                yield f"tasks.{number}.documents.{name}: {len(values)} values of {task['n_documents']} documents"


def wrong_fact(path: str | Path) -> str | None:
    """The first fact of a report file that has another type than its readers expect, with what is wrong; None: none.

    The schema leaves facts free. Raises EvaluationError as `load`.
    """
    with warnings.catch_warnings(action="ignore"):  # pydantic's, of keys that are read only
        facts = TypeAdapter(Facts)
    try:
        facts.validate_python(load(path)["facts"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"facts.{'.'.join(map(str, first['loc']))}: {first['msg'][:200]}"
    return None


def _from_1(report: Mapping[str, Any]) -> Report:
    """Version 1 had no gates and no tails; the verdict is computed from its numbers."""
    filled: dict[str, Any] = dict(report) | {"schema_version": SCHEMA_VERSION, "gates": []}
    try:
        filled["sets"] = [dict(s) | {"tails": None} for s in report["sets"]]
        return conclude(cast("Report", filled), gates=())
    except (KeyError, TypeError, IndexError) as error:
        raise EvaluationError(f"schema version 1, but {error!r} is missing or damaged") from error
