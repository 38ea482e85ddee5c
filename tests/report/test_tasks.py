"""Tasks in a report: section, gates, renderings, model card, comparison."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest
from helpers.reports import FACTS, result

from requant_eval.errors import EvaluationError
from requant_eval.gate import GateError, parse
from requant_eval.metrics.task_metrics import TaskResult, drop, section
from requant_eval.render import ci, compare_tables, html, markdown, model_card, terminal
from requant_eval.report.assemble import build, dumps
from requant_eval.report.compare import Entrant, compare
from requant_eval.report.schema import check, json_schema

DOCUMENTS = 100


def answers(right: int, *, lost: int = 0, won: int = 0) -> list[float]:
    """`right` documents right at first, then the first `lost` of them wrong and `won` others right."""
    values = np.repeat([1.0, 0.0], [right, DOCUMENTS - right])
    values[:lost] = 0
    values[right : right + won] = 1
    return [float(v) for v in values]


def task(name: str = "words", **more: Any) -> TaskResult:
    values = {
        "adapter": {"acc": answers(60), "acc_norm": answers(50)},
        "merged": {"acc": answers(60, lost=1, won=1), "acc_norm": answers(50)},
        "gptq": {"acc": answers(60, lost=9, won=2), "acc_norm": answers(40)},
    }
    given: dict[str, Any] = {
        "name": name, "task": "gsm8k", "digest": "d" * 64, "version": "1.0", "kind": "multiple_choice", "few_shot": 2,
        "limit": None, "chat": False, "metric": "acc", "higher_is_better": True, "n_documents": DOCUMENTS, "missing": {},
    }  # fmt: skip
    values = more.pop("values", values)
    facts: Any = given | more
    return TaskResult(facts=facts, values=values, seconds=dict.fromkeys(values, 1.0))


def report(*tasks: TaskResult, gates: tuple[str, ...] = ()) -> Any:
    return build(
        sets=[result("in-domain")], facts=FACTS, gates=[parse(text) for text in gates], tasks=tasks or (task(),)
    )


def test_the_section_is_paired_by_document() -> None:
    found = section(task())
    step = found["steps"][1]
    assert (step["from"], step["to"], step["became_wrong"], step["became_right"]) == ("adapter", "gptq", 9, 2)
    assert step["difference"]["value"] == pytest.approx(-0.07)
    fallen = drop(found, "gptq")
    assert fallen is not None
    assert fallen["value"] == pytest.approx(7)
    assert (fallen["low"] or 0) < 7 < (fallen["high"] or 0)
    assert drop(found, "adapter") == {"value": 0.0, "se": 0.0, "low": 0.0, "high": 0.0}


def test_less_is_better_where_the_task_says_so() -> None:
    found = drop(section(task(higher_is_better=False)), "gptq")
    assert found is not None
    assert found["value"] == pytest.approx(-7)


def test_values_beyond_one_are_shown_as_they_are() -> None:
    values = {name: {"acc": [3.0, 5.0, 4.0]} for name in ("adapter", "gptq")}
    assert section(task(values=values, n_documents=3))["scale"] == 1


@pytest.mark.parametrize(
    ("limit", "status"), [("-1 points", "fail"), ("20points", "pass"), ("7 points", "inconclusive")]
)
def test_a_gate_limits_the_points_lost(limit: str, status: str) -> None:
    made = report(gates=(f"task words {limit}",))
    assert made["gates"][0]["status"] == status
    assert made["verdict"]["status"] == status
    assert "drop on task words at most" in made["gates"][0]["text"]


def test_a_gate_on_a_task_applies_to_what_ships_alone() -> None:
    """The reference keeps it, merged keeps it; the requantized one does not."""
    options = report(gates=("task words 5 points",))["recommendation"]["options"]
    assert [o["status"] for o in options] == ["inconclusive", "pass", "pass"]


def test_a_variant_that_was_not_run_leaves_the_gate_open() -> None:
    values = {name: v for name, v in task().values.items() if name != "gptq"}
    made = report(task(values=values, missing={"gptq": "does not fit"}), gates=("task words 2 points",))
    assert made["gates"][0]["status"] == "inconclusive"
    assert "gptq: does not fit" in made["gates"][0]["text"]
    assert "words: gptq" in markdown.render(made)


def test_a_gate_on_a_task_that_is_not_there() -> None:
    with pytest.raises(EvaluationError, match="no task 'other', only words"):
        report(gates=("task other 2 points",))
    with pytest.raises(GateError, match="write 2 points"):
        parse("task words 2%")


def test_the_report_keeps_its_schema() -> None:
    made = json.loads(dumps(report()))
    jsonschema.validate(made, json_schema())
    check(made)
    made["tasks"][0]["steps"][0]["to"] = "nobody"
    with pytest.raises(EvaluationError, match=r"tasks\.0\.steps\.0\.to: 'nobody' is no variant of the task"):
        check(made)


def test_every_rendering_has_score_points_and_test() -> None:
    made = report(gates=("task words 1 points",))
    for text in (markdown.render(made), html.render(made)):
        assert "words: gptq" in text
        assert "9 of 100" in text
        assert "0.065" in text, "McNemar's p of 9 against 2"
    assert "Task accuracy was not measured" not in markdown.render(made)
    assert "Task accuracy was not measured" in markdown.render(build(sets=[result("in-domain")], facts=FACTS))
    assert "task words 53.0 (-7.0" in made["headline"]
    assert ci.junit(made)
    from rich.console import Console

    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(terminal.table(made))
    assert "words: gptq" in console.export_text()


def test_the_model_card_has_the_task_in_its_index() -> None:
    card = model_card.model_card(report())
    assert "type: gsm8k" in card
    assert "acc, 2-shot, 95 % interval" in card
    assert "words: gptq" in card
    assert "words: gptq" not in model_card.model_card(report(), without=("gptq",))


def test_runs_are_compared_on_tasks_that_were_asked_alike() -> None:
    worse = {**task().values, "gptq": {"acc": answers(60, lost=30), "acc_norm": answers(40)}}
    one, two = report(), report(task(values=worse))
    other = report(task(digest="e" * 64))
    found = compare([Entrant.of("one", one), Entrant.of("two", two)])
    pair = found["tasks"][0]["pairs"][0]
    assert pair["better"] == "one"
    assert pair["difference"]["value"] == pytest.approx(-0.23)
    assert "Tasks" in markdown.page(compare_tables.document(found))
    left = compare([Entrant.of("one", one), Entrant.of("other", other)])
    assert left["tasks"] == []
    assert "asked in different ways" in left["left_out"][0]


def test_a_set_may_be_called_points() -> None:
    assert parse("ppl_increase points 5 %").text == "perplexity increase on points at most 5 %"
    assert parse("task words 2 points").text == "drop on task words at most 2 points"


def test_a_report_with_other_numbers_of_documents_is_refused() -> None:
    found = report()
    found["tasks"][0]["documents"]["gptq"].pop()
    with pytest.raises(EvaluationError, match=r"tasks\.0\.documents\.gptq: 99 values of 100 documents"):
        check(found)
