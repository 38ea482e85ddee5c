"""Documents that are the same text, or nearly."""

from __future__ import annotations

import random

from requant.data.duplicates import REACH, same_text
from requant.run.recipe_texts import _copies

DRAW = random.Random(0)


def texts(count: int, length: int = 60) -> list[tuple[int, ...]]:
    return [tuple(DRAW.randrange(1000) for _ in range(length)) for _ in range(count)]


def test_each_text_is_its_own() -> None:
    assert same_text([]) == []
    assert same_text(texts(40)) == list(range(40))
    assert same_text([(1,), (2,), (1, 2)]) == [0, 1, 2], "too short for a run of 13"


def test_copies_have_the_number_of_the_first() -> None:
    several = texts(5)
    assert same_text([*several, *several[::-1]]) == [0, 1, 2, 3, 4, 4, 3, 2, 1, 0]
    assert same_text([(1, 2), (3,), (1, 2)]) == [0, 1, 0]


def test_a_changed_word_or_ending_makes_no_other_text() -> None:
    several = texts(20)
    edited = [(*d[:30], 7, *d[31:]) for d in several[:5]]
    longer = [(*d, *extra) for d, extra in zip(several[5:10], texts(5, 20), strict=True)]
    assert same_text([*several, *edited, *longer]) == [*range(20), *range(10)]
    half = [(*d[:20], *extra) for d, extra in zip(several, texts(20, 40), strict=True)]
    assert same_text([*several, *half]) == list(range(40)), "most of it is other text"


def test_what_most_documents_hold_says_nothing() -> None:
    prompt = tuple(range(5000, 5300))
    several = [prompt + d for d in texts(40)]
    assert same_text(several) == list(range(40))
    assert same_text([*several, several[3]])[-1] == 3


def test_many_copies_are_one_text() -> None:
    several = texts(60)
    near = [(*several[0][:50], i, *several[0][51:]) for i in range(2 * REACH)]
    found = same_text([*several, *near])
    assert found == [*range(60), *[0] * len(near)]


def test_copies_in_an_evaluation_set_are_told() -> None:
    """Intervals take documents as independent: copies make them too narrow."""
    several = texts(10)
    (note,) = _copies("x", [*several, *several[:4]])
    assert note.startswith("evaluate.sets: of the 14 documents of set 'x' 4 repeat others, the same or nearly")
    assert _copies("x", several) == []
