"""Evaluation sets whose documents begin alike, such as with a template's system prompt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from requant.recipe import Recipe
from requant_eval.scoring.windows import EvalSet

ALIKE = 0.8  # of the documents that begin with the same tokens
MUCH = 0.05  # of the scored tokens that are these


def fixed_beginnings(recipe: Recipe, sets: Sequence[EvalSet]) -> list[str]:
    """A warning, with line and key, for each set whose scored tokens are in good part the same in its documents.

    Such as the system prompt that a chat template adds: it is learned by heart, and scored once for every row.
    """
    told = []
    for i, s in enumerate(sets):
        length, documents, scored = _same_beginning(s)
        share = scored / max(1, s.n_scored)
        if share >= MUCH:
            told.append(
                f"{recipe.place('evaluate', 'sets', i)}: {share:.0%} of the scored tokens are the same {length} at the "
                f"beginning of {documents} of {s.n_documents} documents (a chat template's own text?): loss, and what "
                "is kept of the fine-tune, are in good part theirs. score: completion scores answers alone"
            )
    return told


def _same_beginning(s: EvalSet) -> tuple[int, int, int]:
    """(tokens that most documents begin with, documents that do, scored tokens among them)."""
    first = {w.document: w for w in reversed(s.windows)}
    ids = {document: w.ids.tolist() for document, w in first.items()}
    alike, length = list(ids), 0
    while True:
        following = Counter(ids[d][length] for d in alike if len(ids[d]) > length)
        token, count = following.most_common(1)[0] if following else (0, 0)
        if count < max(2, ALIKE * len(ids)):
            break
        alike = [d for d in alike if len(ids[d]) > length and ids[d][length] == token]
        length += 1
    return length, len(alike), sum(int(first[d].scored[:length].sum()) for d in alike)
