"""Whether evaluation sets have enough documents for their intervals, before any is scored."""

from __future__ import annotations

from collections.abc import Sequence

from requant.recipe import Recipe
from requant_eval.metrics.statistics import FEW_DOCUMENTS
from requant_eval.scoring.windows import EvalSet

ENOUGH = 100  # decide most gates


def few_documents(recipe: Recipe, sets: Sequence[EvalSet]) -> list[str]:
    """A warning, with line and key, for each set with so few documents that its intervals are wide."""
    return [
        f"{recipe.place('evaluate', 'sets', i, 'data')}: {s.n_documents} documents, and each is one observation: below "
        f"{FEW_DOCUMENTS} intervals are wide and only roughly 95 % ones, and gates stay inconclusive. Give "
        f"{ENOUGH} held-out rows or more"
        for i, s in enumerate(sets)
        if s.n_documents < FEW_DOCUMENTS
    ]
