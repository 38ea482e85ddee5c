"""`requant.run.check.held_out`: sets with few documents are named with line and key."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.command_line import Here
from helpers.e2e import copied, recipe, write_recipe, write_rows

from requant.errors import InputError
from requant.recipe import load
from requant.run import prepare
from requant.run.check.held_out import few_documents
from requant_eval.scoring.windows import Document, EvalSet, make_set


def of(count: int) -> EvalSet:
    return make_set("any", [Document((1, 2, 3, 4)) for _ in range(count)], window=16, bos_id=None)


def test_few_documents_are_named_with_line_and_key(project: Path, tmp_path: Path) -> None:
    file = write_recipe(copied(project, tmp_path / "p"))
    (found,) = few_documents(load(file), [of(20), of(19)])
    line = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if "general.jsonl" in text)
    assert found.startswith(f"{file}:{line}: evaluate.sets.1.data: 19 documents, and each is one observation: below 20")
    assert few_documents(load(file), [of(20), of(21)]) == []


@pytest.mark.slow
def test_check_warns(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = copied(project, tmp_path / "p")
    write_recipe(mine)
    monkeypatch.chdir(mine)
    here = Here(monkeypatch, capsys)
    assert here("check", "recipe.yaml", "--set", "evaluate.sets.0.data.documents=12") == 0, here.err
    (warning,) = [line for line in here.out.splitlines() if "is one observation" in line]
    assert warning.startswith("warning   recipe.yaml:")
    assert "evaluate.sets.0.data: 12 documents" in warning


def test_rows_that_are_cut_off_before_their_answer_are_told(project: Path, tmp_path: Path) -> None:
    mine = copied(project, tmp_path / "p")
    rows = [{"prompt": f"{i} " * (2 if i < 20 else 30), "completion": f" {i} and {i * i}"} for i in range(24)]
    write_rows(mine / "pairs.jsonl", rows)
    for cut, told in ((32, 1), (1000, 0)):
        item = {"name": "pairs", "data": {"path": "./pairs.jsonl"}, "score": "completion", "document_tokens": cut}
        warnings = prepare.prepare(recipe(mine, tmp_path, {"evaluate.sets": [item]})).warnings
        found = [w for w in warnings if "evaluate.sets.0.document_tokens: 4 of 24 documents are cut off before" in w]
        assert len(found) == told


def test_prompts_that_fill_what_is_kept_of_a_document_are_told(project: Path, tmp_path: Path) -> None:
    """The advice was longer texts. An answer beyond the window needs none: it is scored in a window of its own."""
    mine = copied(project, tmp_path / "p")
    rows = [{"prompt": f"{i} " * 60, "completion": f" {i} and {i * i}"} for i in range(24)]
    write_rows(mine / "pairs.jsonl", rows)
    item = {"name": "pairs", "data": {"path": "./pairs.jsonl"}, "score": "completion", "document_tokens": 16}
    with pytest.raises(InputError, match=r"evaluate\.sets\.0\.document_tokens: the prompts of set 'pairs' fill its 16"):
        prepare.prepare(recipe(mine, tmp_path, {"evaluate.sets": [item]}))
    whole = {"evaluate.sets": [item | {"document_tokens": None}], "evaluate.window": 32}
    assert prepare.prepare(recipe(mine, tmp_path, whole)).texts.sets[0].n_documents == 24
