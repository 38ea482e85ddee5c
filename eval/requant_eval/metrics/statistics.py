"""Document-clustered estimates: ratios of document sums with standard errors and intervals.

Tokens of one document are correlated, so the unit is the document. Every estimate is a ratio of two document sums,
sum(a_i) / sum(b_i), with a jackknifed cluster-robust standard error and Student's t with one degree of freedom less
than there are documents. Its coverage is nearer to 95 % than that of the percentile bootstrap (`bench/NOTES.md`).
Pure maths: numpy in, numbers out, no model, file or config.

Units are nats unless said otherwise. Source of the ratio estimator: Cochran, Sampling Techniques, section
6.4; of its jackknife (CR3 among the cluster-robust errors): Bell & McCaffrey, Survey Methodology 28, 2002.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from requant_eval.metrics import records

FEW_DOCUMENTS = 20
LEVEL = 0.95
Z_POWER = 0.8416212  # quantile of the normal distribution at 0.8

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value, its standard error and its 95 % interval, in one unit.

    With one document the standard error and the interval are NaN.
    """

    value: float
    se: float
    low: float
    high: float

    def record(self) -> records.Estimate:
        """As the report has it."""
        return {"value": self.value, "se": self.se, "low": self.low, "high": self.high}

    def scaled(self, factor: float) -> Estimate:
        """In another unit; `factor` > 0."""
        return Estimate(self.value * factor, self.se * factor, self.low * factor, self.high * factor)

    def exp(self) -> Estimate:
        """exp of the value and of the ends; the standard error by the delta method."""
        value = _exp(self.value)
        return Estimate(value, value * self.se, _exp(self.low), _exp(self.high))


@dataclass(frozen=True)
class Sums:
    """Per-document sums of one variant.

    nll: float64 [G], nats. n: float64 [G], scored tokens, all > 0.
    """

    nll: Floats
    n: Floats


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Variant against reference on the same tokens.

    delta: mean of x_V - x_R, nats per token = ln(ppl_V / ppl_R). loss_percent: 100 * (exp(delta) - 1).
    """

    delta: Estimate
    loss_percent: Estimate
    n_documents: int
    few_documents: bool


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """KL(R || V) per token, nats: clustered mean and quantiles."""

    mean: Estimate
    median: float
    p90: float
    p95: float
    p99: float
    p99_9: float
    max: float

    def record(self) -> records.Ladder:
        """As the report has it."""
        return {
            "mean": self.mean.record(),
            "median": self.median,
            "p90": self.p90,
            "p95": self.p95,
            "p99": self.p99,
            "p99_9": self.p99_9,
            "max": self.max,
        }


def document_sums(values: npt.ArrayLike, document: npt.NDArray[np.int32]) -> Floats:
    """Sums per-token `values` [n] over documents numbered 0..G-1: float64 [G].

    Raises:
        ValueError: lengths differ, or a number in 0..G-1 has no token.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.shape != document.shape:
        raise ValueError(f"{array.shape} values for {document.shape} document numbers")
    if not len(document) or (np.bincount(document) == 0).any():
        raise ValueError("documents must be numbered 0..G-1 without gaps, each with a token")
    out: Floats = np.bincount(document, weights=array).astype(np.float64, copy=False)
    return out


def sums(nll: npt.NDArray[np.float64], document: npt.NDArray[np.int32]) -> Sums:
    """Per-document sums of per-token nll [n]."""
    return Sums(document_sums(nll, document), document_sums(np.ones(len(nll)), document))


def ratio(numerator: Floats, denominator: Floats) -> Estimate:
    """sum(a) / sum(b) over G documents: numerator, denominator float64 [G].

    SE = sqrt((G-1)/G * sum (e_i / (1 - h_i))^2) / |sum b| with e_i = a_i - r * b_i and h_i = b_i / sum b: what leaving
    out one document at a time does to r. Documents of equal length give sqrt(G/(G-1) * sum e_i^2) / |sum b|.
    """
    count, total = len(numerator), float(denominator.sum())
    value = float(numerator.sum()) / total
    if count < 2:
        return Estimate(value, math.nan, math.nan, math.nan)
    with np.errstate(divide="ignore", invalid="ignore"):  # one document has all tokens: NaN
        residual = (numerator - value * denominator) / (1 - denominator / total)
    se = math.sqrt((count - 1) / count * float(residual @ residual)) / abs(total)
    half = t_quantile(0.5 + LEVEL / 2, count - 1) * se
    return Estimate(value, se, value - half, value + half)


def mean_nll(variant: Sums) -> Estimate:
    """Nats per token; `.exp()` is the perplexity."""
    return ratio(variant.nll, variant.n)


def bits_per_byte(variant: Sums, n_bytes: int) -> Estimate:
    """Total nll in bits over the UTF-8 bytes of the scored text: comparable across tokenizers."""
    return mean_nll(variant).scaled(float(variant.n.sum()) / (math.log(2) * n_bytes))


def paired(variant: Sums, reference: Sums) -> Paired:
    """delta(V|R) = sum D_i / sum n_i with D_i = nll_V,i - nll_R,i.

    Raises:
        ValueError: the two were not scored on the same documents and tokens.
    """
    if not np.array_equal(variant.n, reference.n):
        raise ValueError("variant and reference have different documents or token counts: not paired")
    delta = ratio(variant.nll - reference.nll, reference.n)
    factor = delta.exp()
    loss = Estimate(100 * (factor.value - 1), 100 * factor.se, 100 * (factor.low - 1), 100 * (factor.high - 1))
    count = len(variant.n)
    return Paired(delta=delta, loss_percent=loss, n_documents=count, few_documents=count < FEW_DOCUMENTS)


def naive_se(values: npt.ArrayLike) -> float:
    """Standard error of a mean if tokens were independent, which they are not: sd / sqrt(n).

    NaN for one token.
    """
    array = np.asarray(values, dtype=np.float64)
    return float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else math.nan


def design_effect(clustered_se: float, independent_se: float) -> float:
    """(clustered SE / naive SE)^2: how many times fewer independent tokens the sample is worth.

    NaN if the naive standard error is 0 or NaN.
    """
    return (clustered_se / independent_se) ** 2 if independent_se > 0 else math.nan


def mean(values: npt.ArrayLike, document: npt.NDArray[np.int32]) -> Estimate:
    """Mean over tokens of `values` [n]."""
    return ratio(document_sums(values, document), document_sums(np.ones(len(document)), document))


def share(flags: npt.NDArray[np.bool_], document: npt.NDArray[np.int32]) -> Estimate:
    """Share of tokens where `flags` bool [n] holds; the interval ends at 0 and 1."""
    found = mean(flags, document)
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def divergence(kl: npt.NDArray[np.float64], document: npt.NDArray[np.int32]) -> Divergence:
    """Mean and quantiles of per-token KL [n]."""
    median, p90, p95, p99, p99_9, largest = (float(q) for q in np.quantile(kl, [0.5, 0.9, 0.95, 0.99, 0.999, 1.0]))
    return Divergence(mean=mean(kl, document), median=median, p90=p90, p95=p95, p99=p99, p99_9=p99_9, max=largest)


def retention(variant: Sums, *, base: Sums, adapter: Sums) -> Estimate | None:
    """1 - delta(V|adapter) / delta(base|adapter): the share of fine-tuning's gain that is left.

    None ("not defined") unless the base loses significantly against the adapter: the lower end of the
    interval of delta(base|adapter) is above 0.
    """
    gain = paired(base, adapter)
    if not gain.delta.low > 0:
        return None
    paired(variant, adapter)
    lost = ratio(variant.nll - adapter.nll, base.nll - adapter.nll)
    return Estimate(1 - lost.value, lost.se, 1 - lost.high, 1 - lost.low)


def documents_to_tell(distance: float, half: float, documents: int) -> float:
    """How many documents put a limit outside of the interval in 80 % of samples; infinite for distance 0.

    distance: of the limit from the value, which is taken for the true one. half: the half interval on that side, of
    `documents` >= 2. The interval is t * se wide to each side and the value itself is scattered by se, so
    (t + 0.84) * se has to fit into the distance, with se falling by the square root of the number of documents.
    Source: the sample size of a one-sided test, Cohen, Statistical Power Analysis, chapter 2.
    """
    if not distance > 0:
        return math.inf
    se = half / t_quantile(0.5 + LEVEL / 2, documents - 1)
    count = float(documents)
    for _ in range(6):  # t falls as documents are added: each round changes the count less; from 500 on by 0.2 %
        t = t_quantile(0.5 + LEVEL / 2, int(min(max(count, documents) - 1, 500)))
        count = documents * ((t + Z_POWER) * se / distance) ** 2
    return count


@lru_cache
def t_quantile(probability: float, df: int) -> float:
    """Quantile of Student's t, by bisection on the exact CDF.

    0 < probability < 1; df: integer >= 1.
    """
    if probability < 0.5:
        return -t_quantile(1 - probability, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < probability:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        if t_cdf(middle, df) < probability:
            low = middle
        else:
            high = middle
    return high


def t_cdf(t: float, df: int) -> float:
    """P(T <= t) of Student's t for integer df.

    Source: the finite trigonometric sums of Abramowitz & Stegun 26.7.3 and 26.7.4.
    """
    theta = math.atan2(t, math.sqrt(df))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = df % 2 == 1
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for k in range(3 if odd else 2, df - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if not odd:
        return 0.5 + sine * total / 2
    return 0.5 + (theta + (sine * total if df > 1 else 0.0)) / math.pi


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
