"""How often 95 % intervals cover the truth, on simulated documents of correlated tokens.

    python bench/coverage.py [--worlds 2000] [--out bench/results/DATE-coverage.json]

Per world: G documents, their scored tokens, and their summed losses against a reference. The methods: tokens taken as
independent, the percentile bootstrap over documents, normal and Student's t quantiles on the cluster-robust error, and
what `requant_eval.statistics.ratio` does (t on the jackknifed error).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "eval")]

from requant_eval.metrics import statistics as st

KINDS = {
    "equal": "192 tokens each, normal",
    "unequal": "50 to 400 tokens, normal",
    "skewed": "50 to 400 tokens, exponential loss",
    "heavy": "log-normal lengths (sigma 1), t(4) loss",
    "linked": "50 to 400 tokens, longer documents lose more",
}
NOISE = 0.3


def worlds(kind: str, count: int, documents: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Loss sums and tokens, each [count, documents]."""
    shape = (count, documents)
    n = rng.integers(50, 400, size=shape).astype(float)
    if kind == "equal":
        n = np.full(shape, 192.0)
    elif kind == "heavy":
        n = np.exp(rng.normal(5, 1, size=shape)).round() + 1
    loss = {
        "skewed": lambda: 0.03 * rng.exponential(size=shape),
        "heavy": lambda: 0.03 + 0.02 * rng.standard_t(4, size=shape),
        "linked": lambda: 0.03 + 0.03 * (n - 225) / 100 + 0.03 * rng.normal(size=shape),
    }.get(kind, lambda: 0.03 + 0.05 * rng.normal(size=shape))()
    return n * loss + NOISE * np.sqrt(n) * rng.normal(size=shape), n


def intervals(a: np.ndarray, n: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[str, float, float]]:
    """(method, low, high) of one world."""
    count, r = len(a), a.sum() / n.sum()
    residual = a - r * n
    robust = np.sqrt(count / (count - 1) * residual @ residual) / n.sum()
    tokens = NOISE / np.sqrt(n.sum())
    drawn = rng.integers(count, size=(1000, count))
    low, high = np.quantile(a[drawn].sum(1) / n[drawn].sum(1), [0.025, 0.975])
    t = st.t_quantile(0.975, count - 1)
    ours = st.ratio(a, n)
    yield "tokens independent", r - 1.96 * tokens, r + 1.96 * tokens
    yield "bootstrap percentile", low, high
    yield "normal, cluster-robust", r - 1.96 * robust, r + 1.96 * robust
    yield "t, cluster-robust", r - t * robust, r + t * robust
    yield "t, jackknifed (ours)", ours.low, ours.high


def coverage(kind: str, documents: int, count: int) -> dict[str, float]:
    """Percentage of worlds whose interval contains the true value, by method."""
    rng = np.random.default_rng(documents)
    truth_a, truth_n = worlds(kind, 1, 4_000_000, rng)
    truth = truth_a.sum() / truth_n.sum()
    hits: dict[str, int] = {}
    for a, n in zip(*worlds(kind, count, documents, rng), strict=True):
        for method, low, high in intervals(a, n, rng):
            hits[method] = hits.get(method, 0) + int(low <= truth <= high)
    return {method: round(100 * hit / count, 1) for method, hit in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    found: list[dict[str, Any]] = []
    for kind, words in KINDS.items():
        for documents in (5, 10, 20, 40, 100):
            row = {"kind": kind, "world": words, "documents": documents} | coverage(kind, documents, wanted.worlds)
            print(json.dumps(row), flush=True)
            found.append(row)
    if wanted.out:
        facts = {"worlds": wanted.worlds, "python": platform.python_version(), "numpy": np.__version__}
        wanted.out.write_text(json.dumps(facts | {"rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
