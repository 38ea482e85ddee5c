"""`requant_eval.render.ci`: exit codes, JUnit XML, the Markdown summary."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

from helpers.reports import FACTS, built

from requant_eval.render import ci

PASSING, FAILING = "ppl_increase in-domain 50%", "ppl_increase in-domain 1%"


def doubtful() -> str:
    edges: list[dict[str, Any]] = built()["sets"][1]["edges"]
    value = next(e for e in edges if (e["from"], e["to"]) == ("adapter", "gptq"))["loss_percent"]["value"]
    return f"ppl_increase in-domain {value:.4f}%"


def test_exit_codes() -> None:
    codes = {
        (): 0,
        (PASSING,): 0,
        (PASSING, FAILING): 3,
        (PASSING, doubtful()): 4,
        (FAILING, doubtful()): 3,
    }
    for gates, code in codes.items():
        assert ci.EXIT_CODES[built(gates=gates)["verdict"]["status"]] == code


def test_junit_has_a_case_a_gate() -> None:
    report = built(FACTS | {"name": '<&"run">'}, gates=(PASSING, FAILING, doubtful(), "kl general 90% of rtn"))
    text = ci.junit(report)
    assert text.startswith("<?xml")
    root = ET.fromstring(text)
    suite = root[0]
    assert (root.tag, suite.tag, len(suite)) == ("testsuites", "testsuite", 4)
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("4", "1", "1")
    assert suite.get("name") == 'requant <&"run">'
    kinds = [next(iter(case)).tag for case in suite]
    assert kinds == ["system-out", "failure", "error", "system-out"]
    assert [case.get("name") for case in suite][1] == "ppl_increase in-domain max 1%"
    assert [case.get("name") for case in suite][3] == "kl general max 90% of rtn"
    for case, gate in zip(suite, report["gates"], strict=True):
        said = case[0].get("message") or case[0].text
        assert said == gate["text"]


def test_a_case_is_named_by_its_rule_alone() -> None:
    names = [
        ci.title(g)
        for g in built(gates=("kl general 0.12", "perplexity general 9", "retention in-domain 90%"))["gates"]
    ]
    assert names == ["kl general max 0.12 nats", "perplexity general max 9", "retention in-domain min 90%"]


def test_the_summary_opens_with_the_verdict() -> None:
    report = built(gates=(PASSING, FAILING))
    lines = ci.summary(report).splitlines()
    assert lines[0] == f"## {report['verdict']['line']}"
    assert lines[2] == report["headline"]
    assert report["recommendation"]["text"] in lines
    assert "### Gates" in lines
    assert "### Gates" not in ci.summary(built(gates=())).splitlines()
    report["warnings"] = ["only 5 documents", "a *b*"]
    warned = ci.summary(report).splitlines()
    assert warned[4:6] == ["- only 5 documents", r"- a \*b\*"], "in CI they would not be seen elsewhere"
