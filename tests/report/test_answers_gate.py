"""A gate on answers: how many fail a check that the reference's do not, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.reports import answered, full

from requant.errors import RecipeError
from requant.recipe import parse as recipe_of
from requant_eval.errors import EvaluationError
from requant_eval.gate import parse
from requant_eval.metrics.answers import GivenAnswers, section
from requant_eval.render import markdown
from requant_eval.report.assemble import conclude

HEAD = "name: x\nbase: {model: ./b}\nadapter: ./a\ncalibration: {data: {path: ./a.txt}}\n"


def judged(limit: int, report: dict[str, Any] | None = None) -> Any:
    return conclude(report or answered(), [parse(f"lost_answers in-domain {limit}")])  # type: ignore[arg-type]


@pytest.mark.parametrize(("limit", "status"), [(0, "fail"), (1, "pass")])
def test_lost_answers_are_counted(limit: int, status: str) -> None:
    report = judged(limit)
    (gate,) = report["gates"]
    assert (gate["status"], gate["estimate"]["value"]) == (status, 1)
    assert gate["text"] == f"answers lost on in-domain at most {limit}, measured 1"
    assert "[1" not in report["verdict"]["line"], "what is counted has no interval"
    assert report["verdict"]["status"] == status
    merged = next(o for o in report["recommendation"]["options"] if o["name"] == "merged")
    assert merged["status"] == "pass", "the merged model loses none"
    assert "answers lost" in markdown.render(report)


def test_without_answers_it_cannot_be_judged() -> None:
    none = section(GivenAnswers(set_name="in-domain", new_tokens=8, why="its rows are plain text"))
    report = judged(1, full() | {"answers": none})
    assert report["gates"][0]["status"] == "inconclusive"
    assert "its rows are plain text" in report["gates"][0]["text"]
    with pytest.raises(EvaluationError, match="the report has no answers on 'in-domain'"):
        judged(1, full())


@pytest.mark.parametrize(
    ("evaluate", "gate", "message"),
    [
        ("sets: [{name: s, data: {path: b.txt}}], answers: {prompts: 0}", "set: s, max: 1", "needs prompts"),
        ("sets: [{name: s, data: {path: b.txt}}, {name: t, data: {path: c.txt}}]", "set: t, max: 1", "in-domain set"),
        ("sets: [{name: s, data: {path: b.txt}}]", "set: s, min: 1", "use max"),
    ],
)
def test_a_recipe_that_could_not_be_judged_is_refused(evaluate: str, gate: str, message: str) -> None:
    text = f"{HEAD}evaluate: {{{evaluate}}}\ngates: [{{metric: lost_answers, {gate}}}]\n"
    with pytest.raises(RecipeError, match=message):
        recipe_of(text, directory=Path("/"))
