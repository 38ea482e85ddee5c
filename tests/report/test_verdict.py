"""`requant_eval.report.verdict`: the three statuses, more documents, the whole verdict."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from helpers.reports import FACTS, built, result, scores
from hypothesis import assume, given
from hypothesis import strategies as hst

from requant_eval.errors import EvaluationError
from requant_eval.gate import Gate, parse
from requant_eval.metrics import statistics as st
from requant_eval.report.assemble import build, conclude
from requant_eval.report.verdict import judge, saved_gates, verdict


def gate_on(report: dict[str, Any], text: str) -> dict[str, Any]:
    return judge(report, [parse(text)])[0]


def total(report: dict[str, Any], name: str = "in-domain", variant: str = "gptq") -> dict[str, Any]:
    s = next(s for s in report["sets"] if s["name"] == name)
    return next(e for e in s["edges"] if (e["from"], e["to"]) == ("adapter", variant))


@pytest.mark.parametrize("side", ["max", "min"])
def test_the_whole_interval_decides(side: str) -> None:
    """On the good side of the limit: pass. On the bad side: fail. Across it: inconclusive."""
    report = built()
    metric = "ppl_increase" if side == "max" else "retention"
    value = total(report)["loss_percent"] if side == "max" else report["sets"][1]["retention"]["gptq"]
    factor = 1 if side == "max" else 100
    low, high = factor * value["low"], factor * value["high"]
    assert low < high
    margin = 0.01 * (high - low)
    good, bad = (high + margin, low - margin) if side == "max" else (low - margin, high + margin)
    answers = {"pass": good, "fail": bad, "inconclusive": (3 * good + bad) / 4}
    for status, limit in answers.items():
        found = judge(report, [Gate(metric, "in-domain", limit)])[0]  # type: ignore[arg-type]
        assert found["status"] == status
        assert found["estimate"]["value"] == pytest.approx(factor * value["value"])
        assert (found["more_documents"] is None) == (status != "inconclusive")


def test_more_documents_are_as_many_as_leave_room_for_the_interval_and_the_scatter() -> None:
    report = built()
    loss = total(report)["loss_percent"]
    half = loss["high"] - loss["value"]
    limit = loss["value"] + half / 2
    found = judge(report, [Gate("ppl_increase", "in-domain", limit)])[0]
    assert found["status"] == "inconclusive"
    # With N documents (t(N-1) + 0.84) se sqrt(30 / N) = half / 2: (2.812 / 1.0226)^2 * 30 = 226.8.
    assert found["more_documents"] == pytest.approx(227 - 30, abs=1)
    assert f"about {found['more_documents']} more documents would tell" in found["text"]
    at_the_limit = judge(report, [Gate("ppl_increase", "in-domain", loss["value"])])[0]
    assert at_the_limit["more_documents"] is None
    assert "no realistic number of documents would tell" in at_the_limit["text"]


@pytest.mark.parametrize(("distance", "few"), [(0.02, 25), (0.035, 25), (0.03, 60)])
def test_with_so_many_documents_four_of_five_samples_decide(distance: float, few: int) -> None:
    """The closed form against 3,000 fresh samples of that size, whose true value is the estimate."""
    rng, sd = np.random.default_rng(0), 0.1
    half = st.t_quantile(0.975, few - 1) * sd / math.sqrt(few)
    count = math.ceil(st.documents_to_tell(distance, half, few))
    assert count > few
    samples = sd * rng.normal(size=(3000, count))
    high = samples.mean(1) + st.t_quantile(0.975, count - 1) * samples.std(1, ddof=1) / math.sqrt(count)
    assert (high <= distance).mean() == pytest.approx(0.8, abs=0.025)


NUMBERS = hst.floats(-1e3, 1e3, allow_nan=False)


@given(ends=hst.tuples(NUMBERS, NUMBERS, NUMBERS), limit=NUMBERS)
def test_the_three_answers_exclude_each_other_and_both_sides_mirror(ends: Any, limit: float) -> None:
    low, value, high = sorted(ends)
    report: Any = {
        "sets": [{"name": "s", "n_documents": 30, "documents": {"gptq": {}}, "variants": [], "retention": {}}]
    }

    def asked(metric: Any, estimate: dict[str, float], where: float) -> dict[str, Any]:
        report["sets"][0]["variants"] = [{"name": "gptq", "ppl": estimate}]
        report["sets"][0]["retention"] = {"gptq": {key: number / 100 for key, number in estimate.items()}}
        return judge(report, [Gate(metric, "s", where)], "gptq")[0]

    found = asked("perplexity", {"value": value, "se": 1.0, "low": low, "high": high}, limit)
    assert (found["status"] == "pass") == (high <= limit)
    assert (found["status"] == "fail") == (low > limit)
    assert found["more_documents"] is None or (found["status"] == "inconclusive" and found["more_documents"] > 0)
    # Above a largest value is below the smallest of the mirror image: retention's limit is a smallest value.
    assume(min(abs(end - limit) for end in (low, high)) > 1e-6)
    mirror = asked("retention", {"value": -value, "se": 1.0, "low": -high, "high": -low}, -limit)
    assert mirror["status"] == found["status"]


def test_relative_to_the_control_is_a_paired_ratio() -> None:
    report = built()
    found = gate_on(report, "ppl_increase in-domain 60% of rtn")
    share = total(report)["delta"]["value"] / total(report, variant="rtn")["delta"]["value"]
    assert found["estimate"]["value"] == pytest.approx(100 * share)
    assert found["status"] == "pass"
    assert gate_on(report, "ppl_increase in-domain 40% of rtn")["status"] == "fail"
    kl = gate_on(report, "kl in-domain 90% of rtn")
    ratio = total(report)["kl"]["mean"]["value"] / total(report, variant="rtn")["kl"]["mean"]["value"]
    assert kl["estimate"]["value"] == pytest.approx(100 * ratio)
    flips = gate_on(report, "right_to_wrong in-domain 90% of rtn")
    ratio = total(report)["right_to_wrong"]["value"] / total(report, variant="rtn")["right_to_wrong"]["value"]
    assert flips["estimate"]["value"] == pytest.approx(100 * ratio)


def test_every_metric_is_the_reports_own_number() -> None:
    report = built()
    edge, s = total(report), report["sets"][1]
    ppl = next(v["ppl"]["value"] for v in s["variants"] if v["name"] == "gptq")
    expected = {
        "ppl_increase in-domain 1%": edge["loss_percent"]["value"],
        "perplexity in-domain 1": ppl,
        "kl in-domain 1": edge["kl"]["mean"]["value"],
        "right_to_wrong in-domain 1%": 100 * edge["right_to_wrong"]["value"],
        "retention in-domain 1%": 100 * s["retention"]["gptq"]["value"],
        "agreement in-domain 1%": 100 * edge["agreement"]["value"],
    }
    for text, value in expected.items():
        assert gate_on(report, text)["estimate"]["value"] == pytest.approx(value, rel=1e-12), text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("retention general 90%", "retention is not defined on general"),
        ("kl bare 0.1", "kl was not measured on bare"),
        ("kl bare 10% of rtn", "kl was not measured on bare"),
        ("ppl_increase alone 10% of rtn", "rtn was not scored on alone"),
    ],
)
def test_what_was_not_measured_is_inconclusive_and_says_why(text: str, why: str) -> None:
    bare = result("bare")
    for s in bare.scores.values():
        s.kl = s.agree = None
    sets = [result("in-domain"), result("general"), bare, result("alone", ("adapter", "gptq"))]
    found = gate_on(build(sets=sets, facts=FACTS), text)
    assert (found["status"], found["estimate"], found["more_documents"]) == ("inconclusive", None, None)
    assert found["text"].endswith(why)


def test_a_control_that_loses_nothing_is_no_measure() -> None:
    same = result("in-domain")
    same.scores["rtn"].nll[:] = same.scores["adapter"].nll  # type: ignore[index]
    found = gate_on(build(sets=[same], facts=FACTS), "ppl_increase in-domain 50% of rtn")
    assert found["status"] == "inconclusive"
    assert "rtn loses nothing measurable on in-domain" in found["text"]


def test_a_gate_on_a_set_that_is_not_there_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="the report has no set 'code', only general, in-domain"):
        built(gates=("kl code 0.1",))


def test_one_failure_fails_and_one_doubt_leaves_in_doubt() -> None:
    report = built()
    middle = f"{total(report)['loss_percent']['value']:.4f}"
    passing, failing = "ppl_increase in-domain 50%", "ppl_increase in-domain 1%"
    doubtful = f"ppl_increase in-domain {middle}%"
    for gates, status in (
        ([passing], "pass"),
        ([passing, doubtful], "inconclusive"),
        ([passing, doubtful, failing], "fail"),
    ):
        found = built(gates=tuple(gates))
        assert found["verdict"]["status"] == status
        assert found["verdict"]["line"].startswith(f"{status.upper()}: GPTQ 4-bit g64 ")
    assert "breaks 1 of 3 gates: perplexity increase on in-domain at most 1 %, measured +" in found["verdict"]["line"]
    line = built(gates=("ppl_increase in-domain 50%", "ppl_increase in-domain 6%"))["verdict"]["line"]
    assert line.startswith(
        "PASS: GPTQ 4-bit g64 keeps 2 of 2 gates; nearest to its limit: perplexity increase on in-domain at most 6 %"
    )
    none = verdict(report, [])
    assert (none["status"], none["line"][:11]) == ("none", "No verdict:")


def test_the_healed_checkpoint_is_judged_when_there_is_one() -> None:
    mended = result("in-domain")
    mended.scores["healed"] = scores(0.01, reference=True)  # type: ignore[index]
    report = build(sets=[mended], facts=FACTS, gates=[parse("ppl_increase in-domain 3%")])
    assert [(g["variant"], g["status"]) for g in report["gates"]] == [("healed", "pass")]
    assert judge(report, [parse("ppl_increase in-domain 3%")], "gptq")[0]["status"] == "fail"


def test_a_report_carries_its_gates() -> None:
    report = built()
    assert [g.text for g in saved_gates(report)] == [
        "perplexity increase on in-domain at most 8 %",
        "perplexity increase on general at most 50 % of rtn's",
        "retention on in-domain at least 80 %",
    ]
    assert conclude(report, saved_gates(report)) == report
    damaged = report | {"gates": [report["gates"][0] | {"metric": "tomorrow's"}]}
    with pytest.raises(EvaluationError, match="upgrade requant"):
        saved_gates(damaged)
