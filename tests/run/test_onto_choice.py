"""`requant.run.onto_choice`: the stated rule decides which base is merged onto."""

from __future__ import annotations

import pytest

from requant.run.onto_choice import decide
from requant.run.stage_results import OntoFacts


def facts(value: float, se: float | None, documents: int = 40, name: str = "one") -> OntoFacts:
    ends = None if se is None else (value - 2 * se, value + 2 * se)
    return {
        "set": name, "documents": documents, "tokens": 900, "losses": {"dequantized": 2.0, "original": 2.0 + value},
        "difference": value, "se": se, "interval": ends,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("found", "onto", "says"),
    [
        ([facts(-0.02, 0.002)], "original", "is 0.0200 nats a token lower (95 %: -0.0240 to -0.0160)"),
        ([facts(0.02, 0.002)], "dequantized", "is 0.0200 nats a token lower (95 %: +0.0160 to +0.0240)"),
        ([facts(-0.02, 0.02)], "dequantized", "cannot be told apart"),
        ([facts(0.0, 0.0)], "dequantized", "cannot be told apart"),
        ([facts(-0.5, None, 1)], "dequantized", "no set has two documents"),
        ([facts(-0.5, None, 1), facts(0.02, 0.002)], "dequantized", "is 0.0200 nats a token lower"),
        # the mean of -0.20 and +0.01, which its own set is sure of
        ([facts(-0.2, 0.01), facts(0.01, 0.001, name="two")], "original", "; on two alone the other merge is surely"),
        ([facts(-0.01, 0.001, name="two"), facts(0.2, 0.01)], "dequantized", "; on two alone the other merge is surely"),
        # sure of -0.01, drowned by a set of few documents that tells nothing
        ([facts(-0.01, 0.001, name="two"), facts(0.0, 0.2, 3)], "dequantized", "cannot be told apart, 0.0050"),
    ],
)  # fmt: skip
def test_the_rule(found: list[OntoFacts], onto: str, says: str) -> None:
    decision = decide(found)
    assert decision["onto"] == onto
    assert says in decision["why"]
    assert (decision["difference"] is None) == ("no set" in says)


def test_the_mean_has_the_freedom_of_its_least_certain_part() -> None:
    """Welch and Satterthwaite: one set's variance rules, so that set's few documents widen the interval."""
    few = decide([facts(-0.1, 0.03, 3), facts(-0.1, 0.001, 400)])
    many = decide([facts(-0.1, 0.03, 400), facts(-0.1, 0.001, 3)])
    assert few["interval"] is not None
    assert many["interval"] is not None
    assert few["interval"][1] - few["interval"][0] == pytest.approx(2 * 4.3027 * 0.030017 / 2, rel=1e-3)  # t of 2
    assert many["interval"][1] - many["interval"][0] == pytest.approx(2 * 1.966 * 0.030017 / 2, rel=1e-3)  # of 400
