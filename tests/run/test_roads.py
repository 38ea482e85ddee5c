"""Roads in a whole run: scored beside ours, done once, kept or removed, never a failed run."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from helpers import e2e
from helpers import tasks as local

from requant.cli import check_command
from requant.errors import InputError, StageError
from requant.evaluate import roads
from requant.quantize import gptqmodel_engine
from requant.run import prepare
from requant.run.observer import Watcher
from requant_eval.render.first_screen import first_screen
from requant_eval.report.records import Report

NF4: dict[str, Any] = {"evaluate.roads": ["rtn", "nf4-merge", "nf4-again"]}
ALL: dict[str, Any] = {"evaluate.roads": [*NF4["evaluate.roads"], "gptqmodel"]}
needs_gptqmodel = pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="gptqmodel is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


class Told(Watcher):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def report_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "report.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.slow
def test_roads_are_scored_once_beside_a_finished_run(project: Path, ran: Path) -> None:
    outcome = e2e.run(project, ran, NF4)
    assert outcome.ran == ["roads", "report"], "the variants have their scores"
    report = report_of(outcome.path)
    found = {one["name"]: one for one in report["roads"]}
    assert list(found) == ["merged", "gptq", "rtn", "nf4-merge", "nf4-again"]
    assert all(one["variant"] and one["bytes"] and one["kl"]["in-domain"] for name, one in found.items())
    for s in report["sets"]:
        scored = {v["name"]: v for v in s["variants"]}
        assert {"nf4-merge", "nf4-again"} <= scored.keys()
        assert len({v["n"] for v in scored.values()}) == 1, "the same windows"
        edges = {(e["from"], e["to"]): e["kind"] for e in s["edges"]}
        assert edges["adapter", "nf4-merge"] == edges["merged", "nf4-again"] == "road"
    assert report["facts"]["evaluation"]["runtimes"]["nf4-merge"].startswith("bitsandbytes, merged by PEFT")
    assert found["gptq"]["bytes"] == found["rtn"]["bytes"] < found["merged"]["bytes"]
    before = e2e.times(outcome.path)
    assert e2e.run(project, ran, NF4).ran == []
    assert e2e.times(outcome.path) == before
    (outcome.path / "report.json").unlink()
    next((outcome.path / ".cache").glob("road-nf4-merge-*")).write_text("{")
    again = e2e.run(project, ran, NF4)
    assert again.ran == ["report"]
    assert report_of(again.path)["roads"] == report["roads"]


@pytest.mark.slow
def test_the_reference_runs_again_where_several_ranks_hold_its_states_in_shares(project: Path, ran: Path) -> None:
    """Roads run on the first rank alone: a library's error on another one would end the run."""
    for file in (ran / "pico" / ".cache").glob("reference-*"):
        file.unlink()
    outcome = e2e.run(project, ran, NF4)
    assert outcome.ran == ["roads", "report"]
    assert all(one["kl"]["general"] for one in report_of(outcome.path)["roads"])


@pytest.mark.slow
def test_roads_answer_canaries_and_prompts(project: Path, ran: Path, tmp_path: Path) -> None:
    """What ships stays what ships."""
    e2e.write_rows(tmp_path / "canaries.jsonl", [{"prompt": "the", "answer": "cat"}, {"prompt": "a", "answer": "dog"}])
    words = [text.split() for text in e2e.texts()["heldout"]]
    rows = [{"prompt": " ".join(w[:5]) + " ", "completion": " ".join(w[5:40])} for w in words]
    e2e.write_rows(tmp_path / "pairs.jsonl", rows)
    changes = NF4 | {
        "canaries": str(tmp_path / "canaries.jsonl"),
        "evaluate.sets.0.data.path": str(tmp_path / "pairs.jsonl"),
        "evaluate.answers": {"prompts": 2, "new_tokens": 4},
    }
    outcome = e2e.run(project, ran, changes)
    assert outcome.ran == ["evaluate", "roads", "report"]
    report = report_of(outcome.path)
    assert {"gptq", "nf4-merge", "nf4-again"} <= report["facts"]["canaries"]["right"].keys()
    assert report["answers"]["shipped"] == "gptq"
    answered = {v["name"]: v["answered"] for v in report["answers"]["variants"]}
    assert answered == dict.fromkeys(("adapter", "merged", "gptq", "nf4-merge", "nf4-again"), 2)
    first = first_screen(cast(Report, report)).answers.cards
    assert [[said.name for said in card.answers] for card in first] == [["adapter", "merged", "gptq"]] * 2
    assert e2e.run(project, ran, changes).ran == []


@pytest.mark.slow
def test_an_interrupted_run_goes_on_with_the_roads_that_are_left(
    project: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(roads, "_merged_again_in_4_bit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            e2e.run(project, ran, NF4)
    done = {f: f.stat().st_mtime_ns for f in (ran / "pico" / ".cache").glob("*nf4-*")}
    assert len(done) == 3, "both sets of the first road, and what its library made"
    outcome = e2e.run(project, ran, NF4)
    assert outcome.ran == ["roads", "report"]
    assert all(f.stat().st_mtime_ns == at for f, at in done.items())
    assert [one["missing"] for one in report_of(outcome.path)["roads"]] == [None] * 5


@pytest.mark.slow
def test_what_a_library_cannot_do_is_a_line_of_the_report(
    project: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the run fails, nor is it tried again."""
    calls = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise StageError("gptqmodel could not quantize merged: no such family <b>")

    def lacking(name: str, *_: Any) -> Any:
        raise StageError("PEFT cannot merge it")

    monkeypatch.setattr(gptqmodel_engine, "quantize_by_defaults", fail)
    monkeypatch.setattr(gptqmodel_engine, "check_installed", lambda key: None)
    monkeypatch.setattr(roads, "version", lambda name: "1.0")
    monkeypatch.setattr(roads, "_merged_in_4_bit", lacking)
    told = Told()
    outcome = e2e.run(project, ran, ALL, watcher=told)
    assert outcome.ran == ["gptqmodel", "roads", "report"]
    found = {one["name"]: one for one in report_of(outcome.path)["roads"]}
    assert found["gptqmodel"]["missing"] == "gptqmodel could not quantize merged: no such family <b>"
    assert found["nf4-merge"]["missing"] == "PEFT cannot merge it"
    assert found["nf4-again"]["variant"] == "nf4-again"
    assert [w for w in told.warnings if w.startswith("road ")] == [
        "road nf4-merge: not measured: PEFT cannot merge it",
        "road gptqmodel: not measured: gptqmodel could not quantize merged: no such family <b>",
    ]
    assert "no such family <b>" not in (outcome.path / "report.html").read_text()
    assert not (outcome.path / "gptqmodel").exists()
    assert e2e.run(project, ran, ALL).ran == []
    assert len(calls) == 1


@pytest.mark.slow
def test_a_lack_of_memory_is_tried_again_in_the_next_run(
    project: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patched:
        patched.setattr(roads, "_merged_in_4_bit", full)
        first = e2e.run(project, ran, NF4)
    missing = {one["name"]: one["missing"] for one in report_of(first.path)["roads"]}
    assert "out of memory" in missing["nf4-merge"]
    assert missing["nf4-again"] is None
    assert e2e.run(project, ran, NF4).ran == ["roads", "report"]
    assert [one["missing"] for one in report_of(first.path)["roads"]] == [None] * 5
    assert e2e.run(project, ran, NF4).ran == []


@needs_gptqmodel
@pytest.mark.slow
@pytest.mark.parametrize("keep", [["merged", "gptq"], ["merged", "gptq", "gptqmodel"]])
def test_gptqmodels_checkpoint_is_made_once_and_kept_where_asked_for(
    project: Path, ran: Path, keep: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"evaluate.roads": ["gptqmodel"], "output.keep": keep}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    outcome = e2e.run(project, ran, changes)
    assert outcome.ran == ["gptqmodel", "roads", "report"]
    assert list((tmp_path / "here").iterdir()) == [], "nothing outside of the run"
    made = outcome.path / "gptqmodel"
    assert made.exists() == ("gptqmodel" in keep)
    found = report_of(outcome.path)["roads"][-1]
    assert found["by"].startswith("gptqmodel ")
    if made.exists():
        stored = (made / "model.safetensors").stat().st_size
        assert stored - 20_000 < found["bytes"] < stored
        texts = [f.read_text(errors="ignore") for f in made.glob("*.json")]
        assert not any(str(tmp_path) in text for text in texts)
    assert e2e.run(project, ran, changes).ran == []
    for file in (outcome.path / ".cache").glob("gptqmodel-*"):
        file.unlink()
    again = ["roads", "report"] if made.exists() else ["gptqmodel", "roads", "report"]
    assert e2e.run(project, ran, changes).ran == again


@local.needs_library
@pytest.mark.slow
def test_roads_answer_tasks_too(project: Path, ran: Path, tmp_path: Path) -> None:
    folder = local.make(tmp_path / "tasks")
    changes = NF4 | {"evaluate.tasks": [{"path": str(folder / "word_problems.yaml"), "limit": 3, "few_shot": 0}]}
    outcome = e2e.run(project, ran, changes)
    assert outcome.ran == ["roads", "tasks", "report"]
    (task,) = report_of(outcome.path)["tasks"]
    assert list(task["documents"]) == ["adapter", "merged", "gptq", "nf4-merge", "nf4-again"]
    assert e2e.run(project, ran, changes).ran == []


def test_a_library_that_is_not_there_is_refused_before_work(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "gptqmodel" else find(n, *a))
    with pytest.raises(InputError, match=r"evaluate\.roads.*which is not installed: pip install gptqmodel optimum"):
        prepare.prepare(e2e.recipe(project, tmp_path, ALL))


@pytest.mark.slow
def test_check_says_what_roads_take(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_command.check(e2e.recipe(project, tmp_path, NF4))
    said = " ".join(capsys.readouterr().out.split())
    assert "road rtn: scored as the variant of this name" in said
    assert "road nf4-merge, by peft " in said
    assert "(nf4, double quantization; as the base is stored): the adapter is merged into the 4-bit base" in said
