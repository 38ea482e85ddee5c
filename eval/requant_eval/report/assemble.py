"""`report.json` from scores and facts; every rendering reads that dict and nothing else.

The dict has no NaN: numbers that are unknown or not defined (retention where the adapter gains nothing) are null.

`facts` is kept whole; `metrics.facts` lists the keys that the renderings read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from requant_eval import whole_files
from requant_eval.errors import EvaluationError
from requant_eval.escaping import in_json
from requant_eval.gate import Gate
from requant_eval.metrics import answers as answer_metrics
from requant_eval.metrics import engine_step, task_metrics
from requant_eval.metrics import statistics as st
from requant_eval.metrics.answers import GivenAnswers
from requant_eval.metrics.facts import known_facts
from requant_eval.metrics.records import EvaluationSet
from requant_eval.metrics.set_metrics import SetResult, fingerprint, section
from requant_eval.metrics.task_metrics import TaskResult
from requant_eval.report.headline import headline
from requant_eval.report.recommend import recommend
from requant_eval.report.records import Report
from requant_eval.report.roads import roads
from requant_eval.report.verdict import judge, verdict

__all__ = ["SCHEMA_VERSION", "SetResult", "build", "conclude", "dumps", "fingerprint", "plain", "save", "save_text"]

SCHEMA_VERSION: Literal[2] = 2  # 1: no gates, verdict, recommendation and tails; document sums of n and nll alone
NUMBERS = re.compile(r"\[\n[-+.,\deE\s]*\]")  # in JSON a line break is never inside a string


def build(
    *,
    sets: Sequence[SetResult],
    facts: Mapping[str, Any],
    in_domain: str | None = None,
    gates: Sequence[Gate] = (),
    tasks: Sequence[TaskResult] = (),
    answers: GivenAnswers | None = None,
) -> Report:
    """The report as a dict of JSON types.

    KL and agreement of every variant are against `adapter`, or `merged` where `adapter` was not scored.
    in_domain: name of the set on which retention is computed; default: the first. gates: what the verdict is made of.
    tasks: what lm-evaluation-harness gave. answers: to prompts of held-out rows.

    Raises:
        EvaluationError: no set, variants of a set scored on different tokens, a gate on a set that is not there.
    """
    if not sets:
        raise EvaluationError("no evaluation set was scored: nothing to report")
    home, known = in_domain or sets[0].name, known_facts(facts)
    rendered: list[EvaluationSet] = [
        {**section(s, in_domain=s.name == home), "kernels": engine_step.steps(known, s.name, s.digest)} for s in sets
    ]
    report: Report = {
        "schema_version": SCHEMA_VERSION,
        "name": known.get("name"),
        "created": known.get("created"),
        "verdict": {"status": "none", "line": "", "more_documents": None},
        "headline": "",
        "gates": [],
        "recommendation": {"choice": None, "text": "", "rule": "", "options": [], "adapters_from": None},
        "sets": rendered,
        **({"tasks": [task_metrics.section(task) for task in tasks]} if tasks else {}),  # type: ignore[typeddict-item]
        **({"answers": answer_metrics.section(answers)} if answers else {}),  # type: ignore[typeddict-item]
        **({"roads": found} if (found := roads(known, rendered)) else {}),  # type: ignore[typeddict-item]
        "facts": dict(facts),
        "warnings": [*(known.get("warnings") or []), *_warnings(rendered)],
    }
    cleaned: Report = plain(report)
    return conclude(cleaned, gates)


def conclude(report: Report, gates: Sequence[Gate]) -> Report:
    """The report with headline, gates, verdict and recommendation, computed from its numbers."""
    judged = judge(report, gates)
    return {
        **report,
        "headline": headline(report),
        "gates": plain(judged),
        "verdict": plain(verdict(report, judged)),
        "recommendation": plain(recommend(report, gates)),
    }


def dumps(report: Mapping[str, object]) -> str:
    """The report as JSON text, each list of numbers on one line.

    Raises:
        ValueError: NaN or infinity in the report.
    """
    text = in_json(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False))
    return NUMBERS.sub(lambda match: " ".join(match[0].split()), text) + "\n"


def plain(value: Any) -> Any:
    """JSON types only: numpy, tuples, sets and paths converted, NaN and infinity to None."""
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return str(value)


def _warnings(sets: Sequence[EvaluationSet]) -> list[str]:
    found = []
    for s in sets:
        if s["few_documents"]:
            found.append(
                f"{s['name']}: only {s['n_documents']} documents; below {st.FEW_DOCUMENTS} "
                "intervals are wide and only roughly 95 % ones"
            )
        found += [
            f"{s['name']}: '{e['to']}' scores exactly like '{e['from']}': was the same model measured twice?"
            for e in s["edges"]
            if e["kl"] is not None and e["kl"]["max"] == 0 and e["delta"]["value"] == 0
        ]
        found += [
            f"{s['name']}: healing made it worse, ln perplexity {e['delta']['value']:+.4f}: heal on more such text"
            for e in s["edges"]
            if e["kind"] == "heal" and (e["delta"]["low"] or 0) > 0
        ]
    return found


def save(report: Mapping[str, object], path: str | Path) -> None:
    """Writes `report.json`, whole or not at all."""
    save_text(path, dumps(report))


def save_text(path: str | Path, text: str) -> None:
    """Writes a file whole or not at all; a link in its place is replaced, not followed."""
    whole_files.write(Path(path), text.encode())
