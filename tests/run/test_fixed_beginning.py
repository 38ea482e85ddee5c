"""`requant.run.fixed_beginning`: a template's own text that is scored with every row."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import e2e

from requant.run.fixed_beginning import fixed_beginnings
from requant_eval.scoring.windows import Document, EvalSet, make_set

SYSTEM = tuple(range(10, 30))


def rows(count: int, fixed: tuple[int, ...], *, odd: int = 0, answers: bool = False) -> list[Document]:
    """`count` documents of 60 own tokens each after the fixed ones; the last `odd` begin otherwise."""
    made = []
    for n in range(count):
        own = tuple(100 + (7 * n + i) % 50 for i in range(60))
        ids = own if n >= count - odd else fixed + own
        made.append(Document(ids, tuple(i >= len(ids) - 30 for i in range(len(ids))) if answers else None))
    return made


def a_set(documents: list[Document]) -> EvalSet:
    return make_set("in-domain", documents, window=128, bos_id=None)


@pytest.mark.parametrize(("odd", "documents"), [(0, 50), (5, 45)])
def test_a_system_prompt_in_most_rows_is_told(project: Path, tmp_path: Path, odd: int, documents: int) -> None:
    recipe = e2e.recipe(project, tmp_path)
    (warning,) = fixed_beginnings(recipe, [a_set(rows(50, SYSTEM, odd=odd))])
    scored = documents * (len(SYSTEM) - 1)  # the first token of a document is not scored
    share = scored / a_set(rows(50, SYSTEM, odd=odd)).n_scored
    assert (
        f"evaluate.sets.0: {share:.0%} of the scored tokens are the same 20 at the beginning of {documents} of 50"
        in (warning)
    )
    assert "score: completion" in warning


@pytest.mark.parametrize(
    "documents",
    [
        rows(50, ()),
        rows(50, SYSTEM[:2]),
        rows(50, SYSTEM, odd=15),
        rows(50, SYSTEM, answers=True),
        rows(1, SYSTEM),
    ],
    ids=["nothing in common", "two tokens", "not most rows", "answers alone are scored", "a single document"],
)
def test_what_is_no_fault_is_not(project: Path, tmp_path: Path, documents: list[Document]) -> None:
    assert fixed_beginnings(e2e.recipe(project, tmp_path), [a_set(documents)]) == []
