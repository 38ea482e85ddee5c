"""`requant_eval.gate`: what a gate means and how a recipe and the command line write it."""

from __future__ import annotations

import pytest

from requant_eval import gate


def make(metric: str, **keys: str | float | None) -> gate.Gate:
    relative = keys.pop("relative_to", None)
    return gate.make(metric, "s", most=keys.get("max"), least=keys.get("min"), relative_to=relative)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected", "said"),
    [
        ("ppl_increase in-domain 5%", gate.Gate("ppl_increase", "in-domain", 5.0), "at most 5 %"),
        ("ppl_increase in-domain 5 %", gate.Gate("ppl_increase", "in-domain", 5.0), "at most 5 %"),
        ("ppl_increase s -0.5%", gate.Gate("ppl_increase", "s", -0.5), "at most -0.5 %"),
        ("ppl_increase s 50% of rtn", gate.Gate("ppl_increase", "s", 50.0, "rtn"), "at most 50 % of rtn's"),
        ("kl s 0.1", gate.Gate("kl", "s", 0.1), "at most 0.1 nats"),
        ("kl s 1e-3", gate.Gate("kl", "s", 0.001), "at most 0.001 nats"),
        ("kl s 10% of rtn", gate.Gate("kl", "s", 10.0, "rtn"), "at most 10 % of rtn's"),
        ("perplexity s 12.5", gate.Gate("perplexity", "s", 12.5), "at most 12.5"),
        ("retention s 90%", gate.Gate("retention", "s", 90.0), "at least 90 %"),
        ("agreement s 85%", gate.Gate("agreement", "s", 85.0), "at least 85 %"),
    ],
)
def test_a_gate_on_the_command_line(text: str, expected: gate.Gate, said: str) -> None:
    got = gate.parse(text)
    assert got == expected
    assert got.text == f"{gate.gate_words(expected.metric)} on {expected.set} {said}"
    assert gate.from_rule(got.rule()) == got, "as the report keeps it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ppl_increase", "is not a gate: write"),
        ("ppl_increase in-domain 5% of", "is not a gate: write"),
        ("ppl_increase in-domain 5% off rtn", "is not a gate: write"),
        ("ppl in-domain 5%", "'ppl' is not one of ppl_increase, perplexity, kl"),
        ("ppl_increase in-domain 5", "5 is not a percentage: write 5%"),
        ("ppl_increase in-domain five%", "five% is not a percentage"),
        ("kl in-domain 5%", "5% is not a number"),
        ("kl in-domain 0.1 of rtn", "0.1 is not a percentage"),
        ("kl in-domain 10% of merged", "'merged' is not rtn, the control"),
        ("retention in-domain 50% of rtn", "only ppl_increase, kl, right_to_wrong can be a share of the control's"),
        ("kl in-domain nan", "nan is not a number"),
    ],
)
def test_what_is_not_a_gate(text: str, message: str) -> None:
    with pytest.raises(gate.GateError) as raised:
        gate.parse(text)
    assert message in str(raised.value)


def test_the_side_belongs_to_the_metric() -> None:
    assert make("retention", min="90%").side == "min"
    assert make("kl", max=0.1).side == "max"
    for metric, wrong, right in (("retention", "max", "min"), ("ppl_increase", "min", "max")):
        with pytest.raises(gate.GateError, match=f"use {right}") as raised:
            make(metric, **{wrong: "5%"})
        assert raised.value.key == wrong
        with pytest.raises(gate.GateError, match="required key is missing") as raised:
            make(metric)
        assert raised.value.key == right


def test_every_metric_is_in_the_recipes_vocabulary() -> None:
    assert set(gate.METRICS) == set(gate.get_args(gate.MetricName))
