"""`requant.deploy.scored_sample`: the beginnings of documents that engines score.

A run keeps the sample for later.
"""

from __future__ import annotations

from pathlib import Path

from requant.deploy.scored_sample import DOCUMENTS, TOKENS, Sample
from requant_eval.scoring.windows import Document, make_set

LONG = Document(tuple(range(3, 303)))


def test_one_row_a_document_from_its_beginning() -> None:
    documents = [LONG, Document((7, 8, 9)), Document(tuple(range(50)))]
    other = make_set("other", [LONG], window=32, bos_id=None)
    home = make_set("home", documents, window=100, bos_id=1, tail=10)
    got = Sample.of([other, home], "home")
    assert (got.set, got.digest) == ("home", home.digest)
    assert got.documents == (0, 1, 2)
    assert got.rows == ((1, *range(3, 66)), (1, 7, 8, 9), (1, *range(50)))
    assert len(got.rows[0]) == TOKENS
    assert Sample.of([other, home]).set == "other"


def test_no_more_than_an_interval_needs() -> None:
    many = make_set("many", [Document((5, 6, 7, i)) for i in range(DOCUMENTS + 5)], window=16, bos_id=None)
    assert Sample.of([many]).documents == tuple(range(DOCUMENTS))


def test_kept_by_the_run_for_its_checkpoints(tmp_path: Path) -> None:
    assert Sample.load(tmp_path / "gptq") is None
    sample = Sample(((1, 2), (3, 4, 5)), (0, 1), "home", "ab")
    sample.save(tmp_path)
    assert Sample.load(tmp_path / "gptq") == sample == Sample.load(tmp_path / ".gptq.partial-1")
