"""Accuracies on documents: interval of one, interval of a paired difference, McNemar's test.

A task scores a document 0 or 1. Where no document changes, the usual standard error of a difference is 0, as if
nothing ever could: these intervals keep a width then, of about three documents in the sample.
"""

from __future__ import annotations

import math

import numpy as np

from requant_eval.metrics.statistics import Estimate, Floats, ratio

Z = 1.959964  # quantile of the normal distribution at 0.975


def is_binary(values: Floats) -> bool:
    """Whether each value is 0 or 1."""
    return bool(np.isin(values, (0.0, 1.0)).all())


def score(values: Floats) -> Estimate:
    """The mean over documents, float64 [G]: of shares Wilson's interval, else Student's t.

    Source: Wilson, Journal of the American Statistical Association 22, 1927.
    """
    if not is_binary(values):
        return ratio(values, np.ones(len(values)))
    count, value = len(values), float(values.mean())
    middle = (value + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z * math.sqrt(value * (1 - value) / count + Z * Z / (4 * count * count)) / (1 + Z * Z / count)
    return Estimate(value, half / Z, max(0.0, middle - half), min(1.0, middle + half))


def difference(after: Floats, before: Floats) -> Estimate:
    """The mean of after - before over the same documents, float64 [G] each.

    Of shares the adjusted Wald interval: one document is added to each of the two kinds of change. Its middle is a
    little nearer to zero than the value. Else Student's t on the differences.
    Source: Bonett & Price, Journal of Educational and Behavioral Statistics 37, 2012.
    """
    if after.shape != before.shape or not len(after):
        raise ValueError(f"{after.shape} and {before.shape} values: not the same documents")
    if not (is_binary(after) and is_binary(before)):
        return ratio(after - before, np.ones(len(after)))
    count = len(after)
    worse, better = changes(after, before)
    p, q = (better + 1) / (count + 2), (worse + 1) / (count + 2)
    half = Z * math.sqrt((p + q - (p - q) ** 2) / (count + 2))
    return Estimate((better - worse) / count, half / Z, max(-1.0, p - q - half), min(1.0, p - q + half))


def changes(after: Floats, before: Floats) -> tuple[int, int]:
    """(documents that became wrong, documents that became right)."""
    return int(((before == 1) & (after == 0)).sum()), int(((before == 0) & (after == 1)).sum())


def mcnemar(worse: int, better: int) -> float:
    """Two-sided p of McNemar's exact test: whether as many documents became wrong as became right.

    Source: McNemar, Psychometrika 12, 1947; the binomial test of the smaller of both counts at one half.
    """
    count, term, total = worse + better, 1, 1
    for k in range(min(worse, better)):
        term = term * (count - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / (1 << count))
