"""`requant_eval.metrics.lookup`: each place of a metric, and None where it is missing."""

from __future__ import annotations

from helpers.reports import built

from requant_eval.metrics.lookup import find_estimate, step_from_reference

HOME = built()["sets"][1]


def test_every_place_is_looked_up() -> None:
    step = step_from_reference(HOME, "gptq")
    assert step is not None
    assert (step["from"], step["to"]) == ("adapter", "gptq")
    assert find_estimate(HOME, "gptq", of="step", key="loss_percent", part=None) == step["loss_percent"]
    assert find_estimate(HOME, "gptq", of="step", key="kl", part="mean") == step["kl"]["mean"]
    row = next(v for v in HOME["variants"] if v["name"] == "gptq")
    assert find_estimate(HOME, "gptq", of="variant", key="ppl", part=None) == row["ppl"]
    assert find_estimate(HOME, "gptq", of="set", key="retention", part=None) == HOME["retention"]["gptq"]


def test_what_was_not_measured_is_none() -> None:
    assert step_from_reference(HOME, "adapter") is None, "the reference itself"
    assert find_estimate(HOME, "base", of="step", key="kl", part="mean") is None, "the base is no step's end"
    assert find_estimate(HOME, "adapter", of="set", key="retention", part=None) is None
    assert find_estimate(HOME, "gptq", of="step", key="newer", part=None) is None, "a key that an older report lacks"
    assert find_estimate(HOME, "healed", of="variant", key="ppl", part=None) is None
