"""The widths of least total loss within a budget of bits: a multiple-choice knapsack."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch

STEPS = 2**17  # of the budget, at most


def allocate(weights: Sequence[int], losses: Sequence[Mapping[int, float]], budget: float) -> list[int]:
    """The bits of each unit: the least sum of losses with a mean of at most `budget` bits a weight.

    weights: of each unit. losses: of each unit, width -> loss, the same widths everywhere. Among equal sums the fewest
    bits. By dynamic programming over the bits above the least width (Kellerer, Pferschy, Pisinger, Knapsack Problems,
    11.5). They are counted in the units' greatest common divisor, which makes the result exact; where that gives more
    than STEPS steps, in STEPS of the budget, each unit rounded up. Raises ValueError for a budget below the least
    width.
    """
    widths = sorted(losses[0])
    least = widths[0]
    spare = math.floor((Fraction(str(budget)) - least) * sum(weights))
    if spare < 0:
        raise ValueError(f"a budget of {budget} bits is below the least width, {least}")
    step = max(math.gcd(*weights), -(-spare // STEPS), 1)
    room = spare // step
    best = torch.full((room + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0.0
    chosen: list[torch.Tensor] = []
    for size, own in zip(weights, losses, strict=True):
        after, width = torch.full_like(best, torch.inf), torch.zeros(room + 1, dtype=torch.uint8)
        for bits in widths:
            cost = -(-size * (bits - least) // step)
            if cost <= room:
                tried = best[: room + 1 - cost] + own[bits]
                better = tried < after[cost:]
                after[cost:][better] = tried[better]
                width[cost:][better] = bits
        best = after
        chosen.append(width)
    return _traced(chosen, weights, int(best.argmin()), least, step)


def _traced(chosen: Sequence[torch.Tensor], weights: Sequence[int], at: int, least: int, step: int) -> list[int]:
    """The widths that lead to the state `at`, from the last unit back to the first."""
    bits: list[int] = []
    for width, size in zip(reversed(chosen), reversed(weights), strict=True):
        bits.append(int(width[at]))
        at -= -(-size * (bits[-1] - least) // step)
    return bits[::-1]
