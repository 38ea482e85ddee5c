"""Answers of a run: asked of adapter, merged model and what ships, kept, refused early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.e2e import recipe, run, texts, write_rows

from requant.errors import InputError
from requant.run import prepare
from requant_eval.render import html
from requant_eval.report.schema import load


def asking(folder: Path, **answers: Any) -> dict[str, Any]:
    """Changes of the recipe: an in-domain set of prompts and completions."""
    words = [text.split() for text in texts()["heldout"]]
    rows = [{"prompt": " ".join(w[:5]) + " ", "completion": " ".join(w[5:40])} for w in words]
    write_rows(folder / "pairs.jsonl", rows)
    changes: dict[str, Any] = {"evaluate.sets.0.data.path": str(folder / "pairs.jsonl")}
    return changes | ({"evaluate.answers": answers} if answers else {})


@pytest.mark.slow
def test_a_run_asks_held_out_rows_and_keeps_the_answers(project: Path, tmp_path: Path) -> None:
    changes = asking(tmp_path, prompts=6, new_tokens=8)
    first = run(project, tmp_path / "runs", changes)
    report = load(first.path)
    found = report["answers"]
    assert (found["set"], found["why"], found["new_tokens"]) == ("in-domain", "", 8)
    assert (found["reference"], found["shipped"]) == ("adapter", "gptq")
    assert [v["name"] for v in found["variants"]] == ["adapter", "merged", "gptq"]
    assert [item["row"] for item in found["items"]] == [1, 5, 9, 13, 17, 21]
    assert all(v["answered"] == 6 for v in found["variants"])
    merged = next(v for v in found["variants"] if v["name"] == "merged")
    assert merged["differ"]["adapter"] == 0, "merging changes no answer in fp32"
    assert all(set(item["given"]) == {"adapter", "merged", "gptq"} for item in found["items"])
    ended = {v["name"]: v["checks"]["ended"] for v in found["variants"]}
    cut = sum("ended" in item["failed"]["gptq"] for item in found["items"])
    assert ended["gptq"] == {"passed": 6 - cut, "of": 6}
    page = (Path(first.path) / "report.html").read_bytes()
    assert len(page) < html.LIMIT == 300_000
    assert page.count(b'class="card"') == 6
    text = (Path(first.path) / "report.md").read_text()
    assert "### The first answers side by side" in text
    assert run(project, tmp_path / "runs", changes).ran == []
    other = run(project, tmp_path / "runs", asking(tmp_path, prompts=2, new_tokens=8))
    assert other.ran == ["evaluate", "report"], "other prompts are asked, nothing is scored again"
    assert len(load(other.path)["answers"]["items"]) == 2


@pytest.mark.slow
def test_a_model_that_runs_block_by_block_is_not_asked(project: Path, tmp_path: Path) -> None:
    changes = asking(tmp_path, prompts=2, new_tokens=4) | {"evaluate.stream": "always"}
    done = run(project, tmp_path / "runs", changes)
    found = load(done.path)["answers"]
    assert {v["name"]: v["answered"] for v in found["variants"]} == {"adapter": 0, "merged": 0, "gptq": 0}
    assert (found["reference"], found["items"]) == (None, [])
    assert run(project, tmp_path / "runs", changes).ran == []


@pytest.mark.slow
def test_a_model_that_did_not_fit_is_asked_once_it_does(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = asking(tmp_path, prompts=2, new_tokens=4)
    with monkeypatch.context() as patched:
        for room in ("evaluate.stage", "run.context"):
            patched.setattr(f"requant.{room}.free_bytes", lambda _: 1000)
        done = run(project, tmp_path / "runs", changes)
        assert {v["answered"] for v in load(done.path)["answers"]["variants"]} == {0}
        assert run(project, tmp_path / "runs", changes).ran == []
    assert run(project, tmp_path / "runs", changes).ran == ["evaluate", "report"]
    assert {v["answered"] for v in load(done.path)["answers"]["variants"]} == {2}
    assert run(project, tmp_path / "runs", changes).ran == []


@pytest.mark.slow
def test_a_recipe_without_prompts_says_nothing_of_them(project: Path, ran: Path) -> None:
    """In place of why there were none."""
    done = run(project, ran, {"evaluate.answers": {"prompts": 0}})
    assert done.ran == ["report"]
    assert not load(done.path).get("answers")


@pytest.mark.slow
def test_plain_text_is_told_to_have_no_prompts(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    assert report["answers"]["why"] == "the rows are plain text and have no prompt"


@pytest.mark.slow
def test_plain_text_is_continued_by_each_variant(project: Path, tmp_path: Path) -> None:
    """Greedy, from the tokens of its beginning; that a text does not end is no failure."""
    changes = {
        "evaluate.answers": {"prompts": 4, "begin": 12, "new_tokens": 8},
        "evaluate.variants": ["adapter", "merged", "gptq"],
    }
    report: Any = run(project, tmp_path, changes).report
    answers = report["answers"]
    assert [len(item["given"]) for item in answers["items"]] == [3] * 4
    assert all("ended" not in v["checks"] and "no_loop" in v["checks"] for v in answers["variants"])
    prepared = prepare.prepare(recipe(project, tmp_path, changes))
    assert prepared.texts.prompts is not None
    asked = prepared.texts.prompts.items[0]
    model = pico.reload(tmp_path / "pico" / "merged")
    with torch.no_grad():
        made = model.generate(torch.tensor([asked.ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)
    own = prepared.texts.prompts.decode(made[0, 12:].tolist())
    assert answers["items"][0]["given"]["merged"] == own.removesuffix("</s>")


def test_by_default_twenty_prompts_are_asked(project: Path, tmp_path: Path) -> None:
    prepared = prepare.prepare(recipe(project, tmp_path, asking(tmp_path)))
    prompts = prepared.texts.prompts
    assert prompts is not None
    assert len(prompts.items) == 20
    assert prompts.new_tokens == 32, "half the window of 64: less than the 64 of a CPU"
    assert [prompts.decode([i]) for i in prompts.stops] == ["</s>"]
    assert all(len(p.ids) + prompts.new_tokens <= 64 for p in prompts.items)
    assert [q.kind for q in prepared.questions] == ["answers"]
    none = prepare.prepare(recipe(project, tmp_path, asking(tmp_path, prompts=0)))
    assert none.texts.prompts is None
    assert none.questions == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate.answers": {"prompts": 3}}, "set in-domain: the rows are plain text and have no prompt"),
        (
            {"gates": [{"metric": "lost_answers", "set": "in-domain", "max": 1}]},
            "evaluate.answers: set in-domain: the rows are plain text",
        ),
        (
            {"evaluate.answers": {"begin": 50, "new_tokens": 20}},
            "evaluate.answers.begin: a prompt of 50 tokens leaves no room for an answer: it may have 44",
        ),
        ({"evaluate.answers": {"new_tokens": 64}}, "evaluate.answers.new_tokens: 64 tokens of an answer leave no room"),
    ],
)
def test_what_was_asked_for_and_cannot_be_is_refused(
    project: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        prepare.prepare(recipe(project, tmp_path, changes))
    assert message in str(caught.value)
    assert "evaluate.sets" not in str(caught.value), "one place in the recipe: that of the key that is wrong"
