"""`requant_eval.metrics.statistics` against direct loops, scipy and simulation."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats

from requant_eval.metrics import statistics as st
from requant_eval.metrics.definitions import OF_STEP


def tokens(documents: int, length: int, *, between: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Normal values with mean 1 that share a shift within a document, and the document numbers."""
    rng = np.random.default_rng(seed)
    document = np.repeat(np.arange(documents, dtype=np.int32), length)
    shift = rng.normal(scale=between, size=documents)
    return 1 + shift[document] + rng.normal(size=len(document)), document


def test_sums_are_per_document() -> None:
    got = st.sums(np.array([1.0, 2.0, 4.0]), np.array([0, 1, 0], dtype=np.int32))
    assert got.nll.tolist() == [5.0, 2.0]
    assert got.n.tolist() == [2.0, 1.0]


def test_sums_refuse_gaps() -> None:
    with pytest.raises(ValueError, match="without gaps"):
        st.document_sums(np.ones(2), np.array([0, 2], dtype=np.int32))


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 18, 19, 60])
def test_t_quantile_is_scipys(df: int) -> None:
    for p in (0.025, 0.4, 0.9, 0.975, 0.999):
        assert st.t_quantile(p, df) == pytest.approx(scipy.stats.t.ppf(p, df), rel=1e-10)
    for t in (-3.0, -0.1, 0.0, 2.5):
        assert st.t_cdf(t, df) == pytest.approx(scipy.stats.t.cdf(t, df), abs=1e-13)


def test_ratio_is_the_jackknife_written_out() -> None:
    """Leave out one document at a time: the spread of what is left is the standard error."""
    a, b = np.array([3.0, 1.0, 7.0]), np.array([2.0, 2.0, 3.0])
    r = 11 / 7
    left = np.array([(11 - x) / (7 - n) for x, n in zip(a, b, strict=True)])
    se = math.sqrt(2 / 3 * sum((left - r) ** 2))
    got = st.ratio(a, b)
    assert got.value == pytest.approx(r)
    assert got.se == pytest.approx(se)
    half = scipy.stats.t.ppf(0.975, 2) * se
    assert (got.low, got.high) == pytest.approx((r - half, r + half))


def test_equal_documents_give_the_cluster_robust_formula() -> None:
    rng = np.random.default_rng(0)
    a, n = rng.normal(size=30), np.full(30, 40.0)
    got = st.ratio(a, n)
    assert got.se == pytest.approx(math.sqrt(30 / 29 * sum((a - got.value * n) ** 2)) / n.sum())


def test_one_document_that_holds_everything_has_no_interval() -> None:
    got = st.ratio(np.array([3.0, 0.0, 0.0]), np.array([2.0, 0.0, 0.0]))
    assert got.value == 1.5
    assert math.isnan(got.se)


def test_one_document_has_a_value_and_no_interval() -> None:
    got = st.ratio(np.array([3.0]), np.array([2.0]))
    assert got.value == 1.5
    assert all(math.isnan(x) for x in (got.se, got.low, got.high))


def test_equal_documents_give_the_classical_standard_error() -> None:
    x = np.random.default_rng(0).normal(size=50)
    got = st.ratio(x, np.ones(50))
    assert got.se == pytest.approx(x.std(ddof=1) / math.sqrt(50))


def bootstrap(a: np.ndarray, b: np.ndarray, resamples: int = 4000) -> tuple[float, float, float]:
    """Standard error and 95 % interval of the ratio by drawing whole documents with replacement."""
    rng = np.random.default_rng(1)
    drawn = rng.integers(len(a), size=(resamples, len(a)))
    ratios = a[drawn].sum(1) / b[drawn].sum(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(ratios.std()), float(low), float(high)


@pytest.mark.parametrize("kind", ["equal", "unequal", "skewed"])
def test_cluster_robust_and_bootstrap_agree(kind: str) -> None:
    """300 documents: the two differ by O(1/300), and the bootstrap of 4000 draws has 1 % error."""
    values, n = worlds_of(kind, count=1, documents=300)[:2]
    got = st.ratio(values[0], n[0])
    se, low, high = bootstrap(values[0], n[0])
    assert got.se == pytest.approx(se, rel=0.06)
    assert (got.low, got.high) == pytest.approx((low, high), abs=0.2 * got.se)


def worlds_of(kind: str, *, count: int, documents: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """Document sums [count, documents], their tokens, and the true mean.

    Tokens of one document share a shift.
    """
    rng = np.random.default_rng(seed)
    shape = (count, documents)
    n = np.full(shape, 192.0) if kind == "equal" else rng.integers(50, 400, size=shape).astype(float)
    shift = 0.03 * rng.gamma(2.0, 0.5, size=shape) if kind == "skewed" else 0.03 + 0.05 * rng.normal(size=shape)
    return n * shift + 0.3 * np.sqrt(n) * rng.normal(size=shape), n, 0.03


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["equal", "unequal", "skewed"])
@pytest.mark.parametrize("documents", [5, 20, 100])
def test_intervals_cover_the_truth_in_95_of_100_worlds(kind: str, documents: int) -> None:
    """5000 worlds of correlated tokens: 95 % +- 1.5; token-level intervals fail.

    The simulation's own error is 0.3.
    """
    values, n, truth = worlds_of(kind, count=5000, documents=documents)
    found = [st.ratio(a, b) for a, b in zip(values, n, strict=True)]
    covered = np.mean([e.low <= truth <= e.high for e in found])
    assert 0.935 <= covered <= 0.965
    independent = 0.3 / np.sqrt(n.sum(1))  # what a token-level error would be: the noise alone
    naive = np.mean(np.abs([e.value - truth for e in found]) <= 1.96 * independent)
    assert naive < 0.85


def test_the_interval_of_a_retention_covers_too() -> None:
    """A ratio of two noisy gains over documents of unequal length."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        n = rng.integers(50, 400, size=30).astype(float)
        adapter = n * rng.gamma(4.0, 0.5, size=30)
        gain = n * (0.5 + 0.15 * rng.normal(size=30))
        lost = 0.08 * gain + 0.02 * n * rng.normal(size=30)
        got = st.retention(st.Sums(adapter + lost, n), base=st.Sums(adapter + gain, n), adapter=st.Sums(adapter, n))
        assert got is not None
        covered += got.low <= 0.92 <= got.high
    assert 0.935 <= covered / 2000 <= 0.965


@pytest.mark.parametrize("documents", [3, 5, 100])
def test_identical_variants_differ_by_exactly_zero(documents: int) -> None:
    n = np.random.default_rng(0).integers(10, 99, size=documents).astype(float)
    own = st.Sums(n * 2.5, n)
    pair = st.paired(own, st.Sums(n * 2.5, n))
    assert pair.delta == st.Estimate(0.0, 0.0, 0.0, 0.0)
    assert pair.loss_percent == st.Estimate(0.0, 0.0, 0.0, 0.0)


def test_the_order_of_documents_changes_only_rounding() -> None:
    values, n, _ = worlds_of("unequal", count=1, documents=40)
    order = np.random.default_rng(1).permutation(40)
    one, other = st.ratio(values[0], n[0]), st.ratio(values[0][order], n[0][order])
    assert (one.value, one.se, one.low, one.high) == pytest.approx(
        (other.value, other.se, other.low, other.high), rel=1e-12
    )


def test_shares_end_at_zero_and_one() -> None:
    document = np.arange(50, dtype=np.int32)
    rare = np.zeros(50, dtype=bool)
    rare[0] = True
    few, most = st.share(rare, document), st.share(~rare, document)
    assert few.low == 0.0
    assert few.high > few.value == pytest.approx(0.02)
    assert most.high == 1.0
    assert most.low == pytest.approx(1 - few.high)


def test_design_effect_is_one_without_correlation() -> None:
    values, document = tokens(2000, 5, between=0.0, seed=0)
    clustered = st.mean(values, document)
    assert st.design_effect(clustered.se, st.naive_se(values)) == pytest.approx(1, abs=0.15)
    assert math.isnan(st.design_effect(0.1, 0.0))


def test_paired_cancels_what_both_share() -> None:
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(60, dtype=np.int32), 20)
    reference = rng.gamma(2.0, size=len(document))
    variant = reference + 0.02 + 0.01 * rng.normal(size=len(document))
    got = st.paired(st.sums(variant, document), st.sums(reference, document))
    assert got.delta.value == pytest.approx(np.mean(variant - reference))
    assert got.loss_percent.value == pytest.approx(100 * (math.exp(got.delta.value) - 1))
    assert got.loss_percent.low == pytest.approx(100 * math.expm1(got.delta.low))
    assert got.delta.se < st.mean_nll(st.sums(variant, document)).se / 20
    assert not got.few_documents


def test_paired_refuses_other_tokens() -> None:
    a = st.Sums(np.ones(2), np.array([2.0, 3.0]))
    with pytest.raises(ValueError, match="not paired"):
        st.paired(a, st.Sums(np.ones(2), np.array([3.0, 2.0])))


def test_few_documents_are_flagged_at_the_border() -> None:
    for count, few in ((19, True), (20, False)):
        sums = st.Sums(np.ones(count), np.ones(count))
        assert st.paired(sums, sums).few_documents is few


def test_perplexity_and_bits_per_byte() -> None:
    sums = st.Sums(np.array([2.0, 4.0]) * math.log(2), np.array([2.0, 4.0]))
    assert st.mean_nll(sums).exp().value == pytest.approx(2)
    assert st.bits_per_byte(sums, 12).value == pytest.approx(0.5)


def test_divergence_ladder() -> None:
    kl = np.arange(1001) / 1000
    got = st.divergence(kl, np.arange(1001, dtype=np.int32) // 10)
    assert (got.median, got.p90, got.p95, got.p99, got.p99_9, got.max) == pytest.approx(
        (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)
    )
    assert got.mean.value == pytest.approx(0.5)


def test_flips_are_shares_of_all_tokens() -> None:
    before = np.array([True, True, False, False])
    after = np.array([False, True, True, False])
    one, two = (
        SimpleNamespace(top1=flags, document=np.array([0, 0, 1, 1], dtype=np.int32)) for flags in (before, after)
    )
    step: Any = SimpleNamespace(before=one, after=two)
    assert [OF_STEP[key](step).value for key in ("right_to_wrong", "wrong_to_right")] == [0.25, 0.25]  # type: ignore[union-attr]


def worlds(documents: int, gain: float, loss: float) -> tuple[st.Sums, st.Sums, st.Sums]:
    """(base, adapter, variant): the adapter gains `gain` nats, the variant loses `loss` of it."""
    rng = np.random.default_rng(0)
    n = rng.integers(50, 150, size=documents).astype(float)
    adapter = n * rng.gamma(4.0, 0.5, size=documents)
    noise = 0.02 * n * rng.normal(size=documents)
    return st.Sums(adapter + gain * n + noise, n), st.Sums(adapter, n), st.Sums(adapter + loss * n, n)


@pytest.mark.parametrize("documents", [10, 100])
def test_retention_is_the_share_of_the_gain_that_is_left(documents: int) -> None:
    base, adapter, variant = worlds(documents, gain=0.5, loss=0.1)
    got = st.retention(variant, base=base, adapter=adapter)
    assert got is not None
    assert got.value == pytest.approx(0.8, abs=0.01)
    assert got.low < got.value < got.high
    whole = st.retention(adapter, base=base, adapter=adapter)
    none = st.retention(base, base=base, adapter=adapter)
    assert whole is not None
    assert none is not None
    assert (whole.value, none.value) == (1.0, 0.0)


@pytest.mark.parametrize("gain", [0.0, -0.5])
def test_retention_is_not_defined_without_a_gain(gain: float) -> None:
    base, adapter, variant = worlds(100, gain=gain, loss=0.1)
    assert st.retention(variant, base=base, adapter=adapter) is None


def test_retention_is_not_defined_when_the_gain_is_within_the_noise() -> None:
    n = np.full(40, 100.0)
    adapter = st.Sums(2 * n, n)
    noise = np.random.default_rng(0).normal(size=40)
    base = st.Sums(adapter.nll + 10 * (noise - noise.mean()) + 0.5, n)
    gain = st.paired(base, adapter).delta
    assert gain.low < 0 < gain.value
    assert st.retention(adapter, base=base, adapter=adapter) is None
