"""`requant_eval.report.compare`: pairing, who is better, what is refused, the Pareto front."""

from __future__ import annotations

import copy
import html
import io
import json
import math
import re
from typing import Any

import numpy as np
import pytest
from helpers.reports import FACTS, result, scores
from rich.console import Console

from requant_eval.errors import EvaluationError
from requant_eval.gate import parse
from requant_eval.render import compare_tables, markdown
from requant_eval.render.html import page
from requant_eval.report.assemble import build, conclude, dumps
from requant_eval.report.compare import Entrant, compare
from requant_eval.report.number_format import format_estimate
from requant_eval.report.schema import load


def run(shift: float, *, size: int = 100, seconds: float = 10, sets: tuple[str, ...] = ("in-domain", "general")) -> Any:
    """A report whose gptq adds `shift` nats to each token of the same texts."""
    made = []
    for name in sets:
        own = result(name)
        own.scores["gptq"] = scores(shift, reference=True)  # type: ignore[index]
        made.append(own)
    cost = {
        "bytes": {"merged": 300, "gptq": size, "base": 90, "adapter": 5},
        "seconds": {"merge": 3, "quantize": seconds, "evaluate": 99},
    }
    facts = FACTS | {"cost": cost}
    return json.loads(dumps(build(sets=made, facts=facts)))


def compared(**reports: Any) -> dict[str, Any]:
    return compare([Entrant.of(name, report) for name, report in reports.items()])


def pair(comparison: dict[str, Any], a: str, b: str, number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = next(p for p in comparison["sets"][number]["pairs"] if (p["a"], p["b"]) == (a, b))
    return found


def test_the_pair_is_the_difference_of_the_reports_own_numbers() -> None:
    good, bad = run(0.02), run(0.08)
    found = pair(compared(good=good, bad=bad), "good", "bad")
    ppl = [next(v["ppl"]["value"] for v in r["sets"][0]["variants"] if v["name"] == "gptq") for r in (good, bad)]
    assert found["delta"]["value"] == pytest.approx(math.log(ppl[1] / ppl[0]), rel=1e-9)
    assert found["percent"]["value"] == pytest.approx(100 * (ppl[1] / ppl[0] - 1), rel=1e-9)
    assert found["better"] == "good"
    turned = pair(compared(bad=bad, good=good), "bad", "good")
    assert turned["delta"]["value"] == pytest.approx(-found["delta"]["value"])
    assert turned["better"] == "good"


def test_pairing_sees_what_the_perplexities_alone_cannot() -> None:
    """The two intervals overlap, the difference is sure: the documents are the same."""
    good, bad = run(0.02), run(0.03)
    ppl = [next(v["ppl"] for v in r["sets"][0]["variants"] if v["name"] == "gptq") for r in (good, bad)]
    assert ppl[0]["high"] > ppl[1]["low"]
    assert pair(compared(good=good, bad=bad), "good", "bad")["better"] == "good"


def test_the_same_run_twice_is_exactly_equal_and_noise_is_not_a_winner() -> None:
    one = run(0.05)
    found = pair(compared(a=one, b=copy.deepcopy(one)), "a", "b")
    assert found["delta"] == {"value": 0.0, "se": 0.0, "low": 0.0, "high": 0.0}
    assert found["better"] is None
    view = compare_tables.pairs_table(compared(a=one, b=one))
    assert {row[2] for row in view.rows} == {"equal"}
    other = copy.deepcopy(one)
    documents = other["sets"][0]["documents"]["gptq"]
    noise = np.random.default_rng(0).normal(size=len(documents["nll"]))
    documents["nll"] = (np.array(documents["nll"]) + 0.1 * (noise - noise.mean())).tolist()
    comparison = compared(a=one, b=other)
    assert pair(comparison, "a", "b")["better"] is None
    assert compare_tables.pairs_table(comparison).rows[0][2] == compare_tables.UNDECIDED


def test_all_pairs_of_three() -> None:
    comparison = compared(a=run(0.02), b=run(0.05), c=run(0.09))
    for s in comparison["sets"]:
        assert [(p["a"], p["b"], p["better"]) for p in s["pairs"]] == [
            ("a", "b", "a"),
            ("a", "c", "a"),
            ("b", "c", "b"),
        ]
        ab, ac, bc = (p["delta"]["value"] for p in s["pairs"])
        assert ab + bc == pytest.approx(ac)
    assert compare_tables.line(comparison) == "in-domain: a is best; general: a is best."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"digest": "e" * 64},
            r"set 'in-domain': a and b were scored on other tokens, digest differs \(dddddddddddd and eeee",
        ),
        ({"fingerprint": "00000000"}, "fingerprint differs .* with the same texts, tokenizer, window and protocol"),
    ],
)
def test_other_tokens_are_refused(change: dict[str, Any], message: str) -> None:
    other = run(0.05)
    other["sets"][0] |= change
    with pytest.raises(EvaluationError, match=message):
        compared(a=run(0.05), b=other)


def test_other_documents_are_refused() -> None:
    other = run(0.05)
    other["sets"][0]["documents"]["gptq"]["n"][0] += 1
    with pytest.raises(EvaluationError, match="documents differs: numbers of different tokens are never compared"):
        compared(a=run(0.05), b=other)


def test_what_cannot_be_compared() -> None:
    one = run(0.05)
    for entrants, message in (
        ([Entrant.of("a", one)], "nothing to compare: name at least two runs"),
        ([Entrant.of("a", one), Entrant.of("a", one)], "a is named twice"),
        ([Entrant.of("a", one), Entrant.of("b", run(0.05, sets=("code",)))], "the runs share no evaluation set"),
    ):
        with pytest.raises(EvaluationError, match=message):
            compare(entrants)
    with pytest.raises(
        EvaluationError, match="a: no variant 'awq' was scored, only base, adapter, merged, rtn, gptq: name"
    ):
        Entrant.of("a", one, "awq")


def test_sets_that_not_all_have_are_left_out_and_said() -> None:
    comparison = compared(a=run(0.05), b=run(0.06, sets=("in-domain",)))
    assert ([s["name"] for s in comparison["sets"]], comparison["left_out"]) == (["in-domain"], ["general"])
    assert "## Not in all runs, left out\n\n- general\n" in markdown.page(compare_tables.document(comparison))


def test_the_pareto_front_is_size_and_every_set() -> None:
    comparison = compared(
        small=run(0.08, size=80), fat=run(0.05, size=120), best=run(0.02, size=100), twin=run(0.02, size=100)
    )
    found = {row["name"]: row["dominated_by"] for row in comparison["runs"]}
    assert found == {"small": None, "fat": "best", "best": None, "twin": None}
    assert [row[-1] for row in compare_tables.runs_table(comparison).rows] == ["yes", "no: best", "yes", "yes"]
    lost = run(0.01)
    del lost["facts"]["cost"]["bytes"]["gptq"]
    comparison = compared(a=run(0.05), lost=lost)
    assert [row["dominated_by"] for row in comparison["runs"]] == [None, "unknown"]


def test_a_perplexity_too_large_for_a_float_is_the_worst() -> None:
    """JSON has no infinity: such a perplexity is null in the report."""
    broken = run(0.02, size=100)
    for s in broken["sets"]:
        next(v for v in s["variants"] if v["name"] == "gptq")["ppl"] = dict.fromkeys(("value", "se", "low", "high"))
    comparison = compared(broken=broken, fine=run(0.05, size=100))
    assert [row["dominated_by"] for row in comparison["runs"]] == ["fine", None]


def test_every_rendering_of_a_comparison_has_the_same_numbers() -> None:
    comparison = compared(a=run(0.02, size=80), b=run(0.05), c=run(0.09))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(compare_tables.terminal(comparison))
    content = compare_tables.document(comparison)
    text = re.sub(r"<[^>]*>", "", html.unescape(page(content))).replace("\N{NO-BREAK SPACE}", " ")
    for seen in (console.export_text(), markdown.page(content), text):
        assert compare_tables.line(comparison) in " ".join(seen.split())
        for s in comparison["sets"]:
            for p in s["pairs"]:
                for number in (f"{p['b']} against {p['a']}", format_estimate(p["percent"], signed=True, unit=" %")):
                    assert number in " ".join(seen.split())
        for row in comparison["runs"]:
            for s in comparison["sets"]:
                assert format_estimate(row["sets"][s["name"]]["ppl"]) in seen


def test_variants_of_one_run_are_entrants_too() -> None:
    one = run(0.05)
    names = ("adapter", "merged", "rtn", "gptq")
    comparison = compare([Entrant.of(f"a:{name}", one, name) for name in names])
    sizes = {row["variant"]: row["bytes"] for row in comparison["runs"]}
    assert sizes == {"adapter": 95, "merged": 300, "rtn": 100, "gptq": 100}
    assert [row["seconds"] for row in comparison["runs"]] == [0, 3, 3, 13], "what each variant needs is counted"
    edge = next(e for e in one["sets"][0]["edges"] if (e["from"], e["to"]) == ("merged", "gptq"))
    assert pair(comparison, "a:merged", "a:gptq")["delta"] == pytest.approx(edge["delta"])


def test_each_variant_is_held_against_its_reports_gates() -> None:
    one = conclude(run(0.05), [parse("ppl_increase in-domain 8%")])
    comparison = compare([Entrant.of(name, one, name) for name in ("adapter", "merged", "rtn", "gptq")])
    assert [row["status"] for row in comparison["runs"]] == ["reference", "pass", "fail", "pass"]
    assert {row["status"] for row in compared(a=run(0.05), b=run(0.06))["runs"]} == {"none"}


def test_other_references_and_machines_are_said() -> None:
    other = run(0.06)
    other["sets"][0]["documents"]["adapter"]["nll"][0] += 1
    other["facts"]["hardware"] = {"gpu": "another"}
    warnings = "\n".join(compared(a=run(0.05), b=other)["warnings"])
    assert "times come from different machines: another, none" in warnings
    assert "in-domain: the runs have different references" in warnings
    assert "general" not in warnings
    assert compared(a=run(0.05), b=run(0.06))["warnings"] == []


def test_an_old_report_can_be_compared(tmp_path: Any) -> None:
    from helpers.reports import OLD

    old = load(OLD)
    comparison = compare([Entrant.of("old", old), Entrant.of("rounded", old, "rtn")])
    assert pair(comparison, "old", "rounded")["better"] == "old"
