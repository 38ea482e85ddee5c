"""A metric is one declaration and one computation: a made-up one needs no other code."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.reports import FACTS, built

from requant_eval import gate
from requant_eval.metrics import definitions
from requant_eval.metrics import statistics as st
from requant_eval.metrics.definitions import Step
from requant_eval.render.set_tables import more_metrics_table, set_tables

BOUND = 0.05  # nats


def lost(before: Any, after: Any) -> Any:
    return after.nll - before.nll > BOUND


@pytest.fixture
def noticed(monkeypatch: pytest.MonkeyPatch) -> str:
    """Registers the share of tokens that lose more than 0.05 nats."""
    declared = gate.Metric(
        words="tokens that lose 0.05 nats", of="step", key="noticed", scale=100, unit="%", side="max", column="noticed"
    )
    monkeypatch.setitem(gate.METRICS, "noticed", declared)

    def of_step(step: Step) -> st.Estimate:
        return st.share(lost(step.before, step.after), step.after.document)

    def sums(scores: Any, before: Any) -> Any:
        return st.document_sums(lost(before, scores), scores.document)

    monkeypatch.setitem(definitions.OF_STEP, "noticed", of_step)
    monkeypatch.setitem(definitions.DOCUMENT_SUMS, "noticed", sums)
    return "noticed"


def test_it_is_computed_shown_and_gated(noticed: str) -> None:
    report = built(FACTS, gates=tuple(f"{noticed} in-domain {limit}%" for limit in (0, 100)))
    home = report["sets"][1]
    step = next(e for e in home["edges"] if (e["from"], e["to"]) == ("adapter", "gptq"))
    share = step[noticed]["value"]
    assert 0 < share < 1, "the made-up scores lose 0.05 nats on average"
    assert [g["status"] for g in report["gates"]] == ["fail", "pass"]
    assert report["gates"][1]["estimate"]["value"] == pytest.approx(100 * share)
    table = more_metrics_table(home)
    assert table.columns == ("variant", "tokens that lose 0.05 nats")
    row = next(r for r in table.rows if r[0] == "gptq")
    assert row[1].startswith(f"{100 * share:.1f}"[:3])
    assert row[1].endswith("]")
    assert "other metrics" in " ".join(t.title for t in set_tables(home))


def test_it_may_be_a_share_of_the_controls(noticed: str) -> None:
    report = built(FACTS, gates=(f"{noticed} in-domain 100% of rtn",))
    home = report["sets"][1]
    ours, control = (sum(home["documents"][name][noticed]) for name in ("gptq", "rtn"))
    assert report["gates"][0]["estimate"]["value"] == pytest.approx(100 * ours / control)
    assert report["gates"][0]["status"] == "pass"


def test_without_it_no_table_is_added() -> None:
    assert not more_metrics_table(built(FACTS)["sets"][0]).rows


def test_what_is_declared_is_computed_and_schemas_know_it() -> None:
    steps = {m.key for m in gate.METRICS.values() if m.of == "step"}
    assert steps <= definitions.OF_STEP.keys()
    assert {m.column for m in gate.METRICS.values() if m.column} <= definitions.DOCUMENT_SUMS.keys()
