"""An adapter that gained nothing, or makes its text worse: said first, and judged."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.reports import FACTS, result
from rich.console import Console

from requant_eval.gate import parse
from requant_eval.render import ci, html, markdown, model_card, terminal
from requant_eval.report.assemble import build

RETENTION = "retention in-domain 90%"
PPL = "ppl_increase in-domain 9%"


def report(shift: float, *gates: str, spread: float = 0.0, facts: Any = None, base: bool = True) -> dict[str, Any]:
    """A report whose base scores `shift` nats more than the adapter, with a spread between documents."""
    made = result("in-domain")
    scores = dict(made.scores)
    adapter = scores["adapter"]
    noise = spread * np.where(adapter.document % 2 == 0, 1.0, -1.0)
    scores["base"] = replace(adapter, nll=adapter.nll + shift + noise)
    if not base:
        del scores["base"]
    return build(sets=[replace(made, scores=scores)], facts=facts or FACTS, gates=[parse(g) for g in gates])


@pytest.mark.parametrize(("shift", "spread"), [(0.0, 0.0), (-0.3, 0.1), (-0.001, 0.5)])
def test_retention_of_nothing_fails_with_the_numbers(shift: float, spread: float) -> None:
    made = report(shift, RETENTION, spread=spread)
    gate = made["gates"][0]
    assert (gate["status"], gate["estimate"], gate["more_documents"]) == ("fail", None, None)
    assert ci.EXIT_CODES[made["verdict"]["status"]] == 3
    step = next(e for e in made["sets"][0]["edges"] if (e["from"], e["to"]) == ("base", "adapter"))
    number = f"{step['loss_percent']['value']:+.3g}".split(".")[0]
    assert "retention on in-domain at least 90 %: not defined, since the adapter gained nothing" in gate["text"]
    assert f"perplexity {number}" in gate["text"] or shift == 0
    assert "retention is not defined, since the adapter gained nothing on in-domain (perplexity" in made["headline"]
    assert "| retention | not defined | >= 90 % | FAIL |" in markdown.render(made)


def test_a_gain_that_may_be_zero_is_inconclusive_and_says_how_many_documents_would_tell() -> None:
    made = report(0.05, RETENTION, spread=0.5)
    gate = made["gates"][0]
    assert gate["status"] == "inconclusive"
    assert gate["more_documents"] > 30
    assert "cannot be told from zero (perplexity -4.9 % [" in gate["text"]
    assert f"about {gate['more_documents']} more documents would tell" in gate["text"]
    assert gate["more_documents"] == made["verdict"]["more_documents"]


def test_a_gain_is_judged_as_ever() -> None:
    assert report(0.5, RETENTION)["gates"][0]["status"] == "inconclusive"
    assert report(0.5, "retention in-domain 50%")["gates"][0]["status"] == "pass"
    assert "Beware" not in report(0.5, PPL)["verdict"]["line"]


@pytest.mark.parametrize("gates", [(PPL,), ()])
def test_a_wrong_base_is_on_the_first_screen_of_every_format(gates: tuple[str, ...]) -> None:
    """The gate on ppl_increase passes: the requantized model is as bad as base + adapter."""
    made = report(-0.3, *gates, spread=0.1)
    assert made["verdict"]["status"] == ("pass" if gates else "none")
    said = "Beware: the adapter makes its own text worse than its base alone does (in-domain: perplexity +35.0 % ["
    assert said in made["verdict"]["line"]
    console = Console(file=io.StringIO(), width=400, record=True)
    console.print(terminal.decision(made))
    assert said in console.export_text().splitlines()[0]
    assert said in markdown.render(made).splitlines()[0]
    assert said in model_card.model_card(made)
    assert said in ci.summary(made).splitlines()[0]
    assert "makes its own text worse" in html.render(made)


def test_what_the_gate_says_is_not_said_again() -> None:
    line = report(-0.3, RETENTION, spread=0.1)["verdict"]["line"]
    assert line.count("+35.0 %") == 1
    assert line.endswith("Beware: is this the base that it was trained on, and its kind of text?")


def test_a_loss_that_may_be_chance_is_no_alarm() -> None:
    assert "Beware" not in report(-0.01, PPL, spread=0.5)["verdict"]["line"]


@pytest.mark.parametrize(("tuned", "alarm"), [((3.4, 3.9), True), ((3.4, 2.0), False)])
def test_without_the_base_the_probe_tells(tuned: tuple[float, float], alarm: bool) -> None:
    """One source on which the adapter gains is enough: a mix holds general text too."""
    probe = [
        {"source": name, "without": 3.2, "with_adapter": with_adapter, "moved": 1.0}
        for name, with_adapter in zip(("train.jsonl", "general"), tuned, strict=True)
    ]
    made = report(0.5, PPL, base=False, facts=FACTS | {"adapter": {"name": "a", "probe": probe}})
    found = "(train.jsonl: 3.2 nats a token without it, 3.4 with it)" in made["verdict"]["line"]
    assert found == alarm


@pytest.mark.parametrize(("shift", "spread", "doubted"), [(0.05, 0.5, True), (0.0, 0.0, True), (0.5, 0.0, False)])
def test_nobody_is_told_to_deploy_a_gain_of_nothing_without_a_word(shift: float, spread: float, doubted: bool) -> None:
    """The gate on ppl_increase passes all the same: requantizing costs little of what is there."""
    made = report(shift, PPL, spread=spread)
    assert made["verdict"]["status"] == "pass"
    text = made["recommendation"]["text"]
    assert text.startswith("Deploy the requantized model")
    said = (
        " First ask whether it is the right adapter and base: on in-domain the adapter gained nothing that can be told"
    )
    assert (said in text) is doubted
