"""`requant_eval.metrics.engine_step`: the step, its pairing, and where a report shows it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from helpers.reports import FACTS, built, result

from requant_eval.errors import EvaluationError
from requant_eval.metrics import engine_step
from requant_eval.render import charts, html, markdown, model_card
from requant_eval.render.set_tables import waterfall_table
from requant_eval.report.assemble import build
from requant_eval.report.schema import check

OURS = [[1.0, 2.0, 3.0], [2.0], [4.0, 1.0], [0.5, 0.5]]
DOCUMENTS = [0, 0, 1, 2]


def shifted(by: float) -> list[list[float]]:
    return [[x + by for x in row] for row in OURS]


def test_a_constant_shift_is_the_step_and_sure() -> None:
    got = engine_step.step(shifted(0.01), OURS, DOCUMENTS)
    assert got["delta"] == pytest.approx({"value": 0.01, "se": 0, "low": 0.01, "high": 0.01}, abs=1e-12)
    assert got["loss_percent"]["value"] == pytest.approx(100 * math.expm1(0.01))
    assert (got["n_documents"], got["n_tokens"]) == (3, 8)


def test_rows_of_one_document_are_one_cluster() -> None:
    """By hand: document sums of the difference 0.4, -0.2 and 0.4 over 4, 2 and 2 tokens."""
    theirs = [[1.1, 2.1, 3.1], [2.1], [3.9, 0.9], [0.7, 0.7]]
    got = engine_step.step(theirs, OURS, DOCUMENTS)
    mean = 0.6 / 8
    leave_one_out = [(0.6 - d) / (8 - n) for d, n in ((0.4, 4), (-0.2, 2), (0.4, 2))]
    se = math.sqrt(2 / 3 * sum((x - mean) ** 2 for x in leave_one_out))
    assert got["delta"]["value"] == pytest.approx(mean)
    assert got["delta"]["se"] == pytest.approx(se)


def test_what_has_no_number_is_none() -> None:
    alone = engine_step.step(shifted(0.01), OURS, [0, 0, 0, 0])
    assert alone["delta"]["value"] == pytest.approx(0.01)
    assert (alone["delta"]["se"], alone["delta"]["low"], alone["delta"]["high"]) == (None, None, None)
    broken = engine_step.step([[math.nan, 2.0, 3.0], *OURS[1:]], OURS, DOCUMENTS)
    assert broken["delta"]["value"] is None


@pytest.mark.parametrize(("theirs", "documents"), [(OURS[:3], DOCUMENTS), (shifted(0)[::-1], DOCUMENTS), (OURS, [0])])
def test_other_tokens_are_not_paired(theirs: list[list[float]], documents: list[int]) -> None:
    with pytest.raises(EvaluationError, match="scored other tokens than our decoding: the two cannot be paired"):
        engine_step.step(theirs, OURS, documents)


def proof(digest: str | None, **engine: Any) -> dict[str, Any]:
    row = {
        "engine": "vllm", "dtype": "bfloat16", "device": "cpu", "kernels": ["K"], "versions": {"vllm": "9"},
        "load_seconds": 2.0, "error": None, "tolerance": 0.02, "perplexity": 3.0, "difference": 0.01, "ok": True,
        "tokens_per_second": 50.0,
    } | engine_step.step(shifted(0.01), OURS, DOCUMENTS)  # fmt: skip
    return {
        "perplexity": 3.0, "sample_tokens": 8, "sample_set": "in-domain", "sample_digest": digest, "tensors": 9, "linears": 3,
        "engines": [row | engine],
    }  # fmt: skip


def reported(**changes: Any) -> dict[str, Any]:
    digest = next(s["digest"] for s in built()["sets"] if s["name"] == "in-domain")
    return built(FACTS | {"verify": proof(changes.pop("digest", digest), **changes)})


def of(report: dict[str, Any], name: str) -> dict[str, Any]:
    return next(s for s in report["sets"] if s["name"] == name)


def test_the_step_stands_in_the_waterfall_of_its_set() -> None:
    report = reported()
    check(report)
    assert [e["to"] for e in of(report, "in-domain")["kernels"]] == ["vllm"]
    assert [s["kernels"] for s in report["sets"] if s["name"] != "in-domain"] == [[]]
    rows = {row[0]: row for row in waterfall_table(of(report, "in-domain")).rows}
    assert rows["gptq -> vllm"][3] == "served in bfloat16 on cpu, 3 documents"
    assert rows["gptq -> vllm"][2].startswith("+0.01")
    for text in (markdown.render(report), model_card.model_card(report), html.render(report)):
        assert "served in bfloat16 on cpu, 3 documents" in text
    drawn = charts.waterfall(of(report, "in-domain") | {"gates": []})
    assert [(r.label, r.note) for r in drawn.rows if "vllm" in r.label] == [
        ("gptq in vllm", "served in bfloat16 on cpu, 3 documents")
    ]


def test_other_tokens_or_a_refusal_are_no_step() -> None:
    assert of(reported(digest="0" * 64), "in-domain")["kernels"] == []
    refused = reported(error="ValueError: no", delta=None, tokens_per_second=None)
    assert of(refused, "in-domain")["kernels"] == []
    assert "does not load" in markdown.render(refused)


def test_a_variant_that_was_not_scored_is_in_the_table_alone() -> None:
    scored = result("in-domain", ("base", "adapter"))
    report = build(sets=[scored], facts=FACTS | {"verify": proof(scored.digest)})
    assert [row[0] for row in waterfall_table(report["sets"][0]).rows][-1] == "gptq -> vllm"
    drawn = charts.waterfall(report["sets"][0] | {"gates": []})
    assert not any("vllm" in r.label for r in drawn.rows)


def test_healed_has_steps_and_speeds_of_its_own_and_no_place_in_the_card_of_gptq() -> None:
    digest = of(built(), "in-domain")["digest"]
    facts = FACTS | {"verify": proof(digest), "heal": {"verify": proof(digest, tokens_per_second=60.0)}}
    assert [e["from"] for e in engine_step.steps(facts, "in-domain", digest)] == ["gptq", "healed"]
    assert engine_step.speeds(facts) == {"gptq": {"vllm": 50.0}, "healed": {"vllm": 60.0}}
    report = built(facts)
    text = markdown.render(report)
    assert "### gptq in each engine" in text
    assert "### healed in each engine" in text
    card = model_card.model_card(report, without=("healed",))
    assert "### gptq in each engine" in card
    assert "healed" not in card
