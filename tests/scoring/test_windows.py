"""`requant_eval.scoring.windows`: each protocol against windows cut by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from requant_eval.errors import EvaluationError
from requant_eval.scoring.windows import Document, EvalSet, make_set

BOS = 1


def cut(eval_set: EvalSet) -> list[tuple[int, list[int], list[int]]]:
    """(document, ids, scored positions) of every window."""
    return [(w.document, w.ids.tolist(), w.scored.nonzero()[:, 0].tolist()) for w in eval_set.windows]


def doc(*ids: int, scored: str | None = None, n_bytes: int = 0) -> Document:
    return Document(ids, None if scored is None else tuple(c == "x" for c in scored), n_bytes)


def test_documents_without_bos_score_all_but_the_first_of_each_window() -> None:
    got = make_set("s", [doc(5, 6, 7, 8, 9, 10), doc(11, 12)], window=4, bos_id=None, tail=2)
    assert cut(got) == [
        (0, [5, 6, 7, 8], [1, 2, 3]),
        (0, [9, 10], [1]),
        (1, [11, 12], [1]),
    ]
    assert (got.n_documents, got.n_scored, got.dropped, got.bos) == (2, 5, 0, False)


@pytest.mark.parametrize("head", [(), (BOS,)])
def test_bos_opens_every_window_once_and_is_not_scored(head: tuple[int, ...]) -> None:
    got = make_set("s", [doc(*head, 5, 6, 7, 8, 9)], window=4, bos_id=BOS, tail=1)
    assert cut(got) == [(0, [BOS, 5, 6, 7], [1, 2, 3]), (0, [BOS, 8, 9], [1, 2])]
    assert got.n_scored == 5
    assert got.bos


def test_short_tail_is_dropped_and_counted_but_a_short_document_is_kept() -> None:
    got = make_set("s", [doc(*range(10, 17)), doc(3, 4)], window=5, bos_id=None, tail=3)
    assert cut(got) == [(0, [10, 11, 12, 13, 14], [1, 2, 3, 4]), (1, [3, 4], [1])]
    assert got.dropped == 2


def test_an_answer_in_a_short_tail_is_scored_with_the_context_before_it() -> None:
    """A chat one token longer than the window would lose its answer, and the set that row, without a word."""
    documents = [doc(*range(10, 17), scored="....xxx"), doc(*range(20, 27), scored="x......"), doc(*range(30, 37))]
    got = make_set("s", documents, window=5, bos_id=None, tail=3)
    assert cut(got) == [
        (0, [10, 11, 12, 13, 14], [4]),
        (0, [12, 13, 14, 15, 16], [3, 4]),
        (1, [30, 31, 32, 33, 34], [1, 2, 3, 4]),
    ]
    assert got.dropped == 4, "of the two whose tails hold no answer"
    got = make_set("s", [doc(BOS, *range(10, 17), scored="......xx")], window=5, bos_id=BOS, tail=4)
    assert cut(got) == [(0, [BOS, 13, 14, 15, 16], [3, 4])]


def test_full_windows_shorter_than_tail_are_kept() -> None:
    got = make_set("s", [doc(*range(10, 18))], window=4, bos_id=None, tail=64)
    assert len(got.windows) == 2


def test_mask_moves_with_the_ids_and_silent_windows_are_left_out() -> None:
    documents = [doc(9, 9), doc(BOS, 5, 6, 7, 8, scored="x...x"), doc(4, 4, 4, scored="...")]
    got = make_set("s", documents, window=3, bos_id=BOS, tail=1)
    assert cut(got) == [(0, [BOS, 9, 9], [1, 2]), (1, [BOS, 7, 8], [2])]
    assert got.n_documents == 2


def test_tokens_stops_at_a_window_border() -> None:
    documents = [doc(*range(10, 18)), doc(*range(20, 28))]
    got = make_set("s", documents, window=4, bos_id=None, tail=1, tokens=7)
    assert cut(got)[-1] == (1, [20, 21, 22, 23], [1, 2, 3])
    assert got.n_scored == 9
    whole = make_set("s", documents, window=4, bos_id=None, tail=1, tokens=6)
    assert (whole.n_documents, whole.n_scored) == (1, 6)


def test_bytes_count_in_proportion_to_what_was_scored() -> None:
    whole = make_set("s", [doc(5, 6, 7, 8, n_bytes=40)], window=9, bos_id=BOS)
    assert whole.n_bytes == 40
    part = make_set("s", [doc(5, 6, 7, 8, n_bytes=40)], window=9, bos_id=None)
    assert part.n_bytes == 30
    unknown = make_set("s", [doc(5, 6, n_bytes=40), doc(5, 6)], window=9, bos_id=BOS)
    assert unknown.n_bytes == 0


def test_gptq_windows_drop_the_tail_and_are_clusters() -> None:
    ids = tuple(range(2 * 2048 + 100))
    got = make_set("s", [Document(ids)], protocol="gptq-2048", bos_id=BOS, window=77)
    assert [(w.document, w.ids.tolist()) for w in got.windows] == [
        (0, list(ids[:2048])),
        (1, list(ids[2048:4096])),
    ]
    assert (got.n_scored, got.dropped, got.window, got.bos) == (2 * 2047, 100, 2048, False)


def test_llamacpp_scores_the_second_half_after_a_bos() -> None:
    ids = tuple(range(1000, 1000 + 2 * 512 + 5))
    got = make_set("s", [Document(ids)], protocol="llamacpp-512", bos_id=BOS)
    assert cut(got)[1] == (1, [BOS, *ids[513:1024]], list(range(257, 512)))
    assert (got.n_scored, got.dropped, got.bos) == (2 * 255, 5, True)
    plain = make_set("s", [Document(ids)], protocol="llamacpp-512", bos_id=None)
    assert int(plain.windows[0].ids[0]) == 1000


def test_digest_sees_ids_masks_and_borders_but_not_the_name() -> None:
    def digest(*documents: Document, name: str = "a") -> str:
        return make_set(name, list(documents), window=8, bos_id=BOS).digest

    base = digest(doc(5, 6), doc(7, 8))
    assert digest(doc(5, 6), doc(7, 8), name="b") == base
    others = {
        digest(doc(5, 6), doc(7, 9)),
        digest(doc(5, 6, scored=".x"), doc(7, 8)),
        digest(doc(5, 6, 7, 8)),
        base,
    }
    assert len(others) == 4


@pytest.mark.parametrize(
    ("documents", "options", "words"),
    [
        ([], {}, "nothing to score"),
        ([doc(5)], {}, "nothing to score"),
        ([doc(5, 6, scored="..")], {}, "nothing to score .*1 of them hold no token that is to be scored"),
        ([doc(5)], {}, "give longer texts"),
        ([doc(5, 6), doc(7, 8)], {"protocol": "gptq-2048"}, "one joined text"),
        ([doc(5, 6)], {"protocol": "gptq-2048"}, "nothing to score"),
        ([doc(5, 6)], {"protocol": "wikitext"}, "unknown protocol"),
        ([doc(5, 6)], {"window": 1}, "at least 2"),
        ([doc(5, 6)], {"tokens": 0}, "at least 1"),
        ([replace(doc(5, 6), scored=(True,))], {}, "scored flags"),
    ],
)
def test_what_cannot_be_scored_says_so(documents: list[Document], options: dict[str, object], words: str) -> None:
    with pytest.raises(EvaluationError, match=words):
        make_set("s", documents, bos_id=None, **options)  # type: ignore[arg-type]
