"""`requant_eval.metrics.proportions`: against scipy; how often intervals hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from requant_eval.metrics import proportions


@pytest.mark.parametrize(("right", "of"), [(0, 10), (3, 10), (10, 10), (151, 200)])
def test_the_interval_of_a_share_is_wilsons(right: int, of: int) -> None:
    found = proportions.score(np.repeat([1.0, 0.0], [right, of - right]))
    expected = scipy.stats.binomtest(right, of).proportion_ci(method="wilson")
    assert found.value == right / of
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (1, 0), (3, 3), (2, 11), (40, 17), (700, 900)])
def test_mcnemar_is_the_binomial_test_of_the_documents_that_changed(worse: int, better: int) -> None:
    expected = scipy.stats.binomtest(worse, worse + better).pvalue if worse + better else 1.0
    assert proportions.mcnemar(worse, better) == pytest.approx(expected)


def test_where_nothing_changed_the_difference_is_not_sure_to_be_zero() -> None:
    """Three documents in a hundred: a gate of one point is not decided by a hundred equal answers."""
    same = np.repeat([1.0, 0.0], [60, 40])
    found = proportions.difference(same, same)
    assert found.value == 0
    assert -0.03 < found.low < -0.02
    assert found.high == pytest.approx(-found.low)


@pytest.mark.parametrize("documents", [20, 50, 200])
def test_the_interval_of_a_difference_holds_the_truth(documents: int) -> None:
    """Documents become wrong with 8 %, right with 3 %: the true difference is -5 points."""
    draw = np.random.default_rng(documents)
    held = 0
    for _ in range(1000):
        kind = draw.random(documents)
        before = np.where(kind < 0.03, 0.0, 1.0)
        after = np.where((kind < 0.03) | (kind >= 0.11), 1.0, 0.0)
        found = proportions.difference(after, before)
        held += found.low <= -0.05 <= found.high
    assert 930 <= held <= 1000


def test_values_between_zero_and_one_have_students_interval() -> None:
    before, after = np.array([0.2, 0.5, 0.9, 0.4]), np.array([0.3, 0.5, 0.7, 0.4])
    found = proportions.difference(after, before)
    expected = scipy.stats.t.interval(0.95, 3, loc=-0.025, scale=scipy.stats.sem(after - before))
    assert (found.low, found.high) == pytest.approx(expected)


def test_other_documents_are_not_paired() -> None:
    with pytest.raises(ValueError, match="not the same documents"):
        proportions.difference(np.ones(3), np.ones(4))
