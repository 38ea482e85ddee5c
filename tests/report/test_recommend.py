"""`requant_eval.report.recommend`: the rule, the table, the number of adapters that decides."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.reports import FACTS, built, result

from requant_eval.gate import parse
from requant_eval.render.markdown import render
from requant_eval.render.tables import options_table
from requant_eval.report.assemble import build
from requant_eval.report.recommend import RULE


def choice(*gates: str) -> tuple[str | None, str]:
    found = built(gates=gates)["recommendation"]
    return found["choice"], found["text"]


def options(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {o["name"]: o for o in report["recommendation"]["options"]}


def test_the_cheapest_that_keeps_the_gates() -> None:
    """GPTQ loses 5 %, merged 0.1 %, base + adapter nothing."""
    assert choice("ppl_increase in-domain 8%")[0] == "requantized"
    got, text = choice("ppl_increase in-domain 1%")
    assert got == "merged"
    assert text.startswith("Deploy the merged 16-bit model (300 MB): it keeps the gates; requantized breaks the gates.")
    got, text = choice("ppl_increase in-domain 0.01%")
    assert got == "separate"
    assert "Keep base + adapter apart (100 MB): what training saw, without a loss" in text
    assert "requantized breaks the gates, merged 16-bit breaks the gates" in text


def test_a_doubt_is_not_a_pass() -> None:
    value = next(e for e in built()["sets"][1]["edges"] if (e["from"], e["to"]) == ("adapter", "gptq"))["loss_percent"]
    got, text = choice(f"ppl_increase in-domain {value['value']:.4f}%")
    assert got == "merged"
    assert "requantized cannot be told from the gates yet" in text


def test_a_gate_that_base_and_adapter_break_too_leaves_nothing_to_recommend() -> None:
    got, text = choice("perplexity in-domain 1.5")
    assert got is None
    assert text == "No recommendation: even base + adapter does not keep the gates."


def test_without_gates_the_limit_is_said() -> None:
    report = built(gates=())
    assert report["verdict"]["status"] == "none"
    assert options(report)["requantized"]["status"] == "fail", "5.1 % is over the default limit of 5 %"
    assert "the limit of 5% in-domain (no gates are set)" in report["recommendation"]["text"]


def test_the_rule_is_printed_with_the_table() -> None:
    report = built(gates=("ppl_increase in-domain 8%",))
    text = render(report)
    assert RULE in text
    assert report["recommendation"]["text"] in text
    rows = {row[0]: row for row in options_table(report).rows}
    assert set(rows) == {"requantized (recommended)", "merged 16-bit", "base + adapter apart"}
    assert "0 % (the reference)" in rows["base + adapter apart"]
    assert "one base for all" in rows["base + adapter apart"]


def test_the_losses_are_those_of_the_steps() -> None:
    report = built()
    for name, variant in (("requantized", "gptq"), ("merged", "merged")):
        for s in report["sets"]:
            edge = next(e for e in s["edges"] if (e["from"], e["to"]) == ("adapter", variant))
            assert options(report)[name]["loss"][s["name"]] == edge["loss_percent"]


def test_sizes_and_the_number_of_adapters_from_which_apart_is_smaller() -> None:
    report = built(gates=("ppl_increase in-domain 8%",))
    sizes = {name: o["bytes"] for name, o in options(report).items()}
    assert sizes == {"requantized": 100_000_000, "merged": 300_000_000, "separate": 100_000_000}
    many = report["recommendation"]["adapters_from"]
    cost = FACTS["cost"]["bytes"]
    assert many == next(n for n in range(1, 100) if cost["base"] + n * cost["adapter"] < n * cost["gptq"])
    assert f"Where {many} or more adapters of one base are served, one base" in report["recommendation"]["text"]


@pytest.mark.parametrize("lost", ["base", "adapter", "gptq"])
def test_unknown_sizes_are_unknown(lost: str) -> None:
    cost = {"bytes": {k: v for k, v in FACTS["cost"]["bytes"].items() if k != lost}}
    report = built(FACTS | {"cost": cost})
    assert report["recommendation"]["adapters_from"] is None
    assert "unknown" in render(report)
    assert "or more adapters" not in report["recommendation"]["text"]


def test_measured_speed_is_shown_and_unmeasured_is_not_made_up() -> None:
    assert "tokens/s" not in options_table(built()).columns
    engines = [{"engine": "vllm", "tokens_per_second": 812.5}, {"engine": "transformers", "tokens_per_second": None}]
    table = options_table(built(FACTS | {"verify": {"engines": engines}}))
    at = table.columns.index("tokens/s, one sequence")
    assert [row[at] for row in table.rows] == ["vllm 812.5", "not measured", "not measured"]


def test_what_was_not_scored_is_not_recommended() -> None:
    gates = [parse("ppl_increase wiki 1%")]
    report = build(sets=[result("wiki", ("base", "adapter", "gptq"))], facts=FACTS, gates=gates)
    assert report["recommendation"]["choice"] == "separate"
    assert "merged 16-bit was not scored" in report["recommendation"]["text"]
    nothing = build(sets=[result("wiki", ("base",))], facts=FACTS)["recommendation"]
    assert (nothing["choice"], nothing["text"]) == (
        None,
        "No recommendation: nothing was measured against base + adapter.",
    )
