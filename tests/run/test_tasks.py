"""Tasks in a whole run: report, gate, resuming; and the report sent to trackers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import e2e
from helpers import tasks as local

from requant.errors import InputError
from requant.run.observer import Watcher
from requant.tracking import trackers


class Told(Watcher):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@local.needs_library
@pytest.mark.slow
def test_tasks_are_in_the_report_and_only_what_changed_is_asked_again(project: Path, ran: Path, tmp_path: Path) -> None:
    """Of a finished run: the stages before the tasks are not repeated."""
    folder = local.make(tmp_path / "tasks")
    changes: dict[str, Any] = {
        "evaluate.tasks": [
            {"path": str(folder / "python_functions.yaml"), "limit": 12, "few_shot": 0},
            {"path": str(folder / "word_problems.yaml"), "limit": 4, "few_shot": 1},
        ],
        "gates": [{"metric": "task", "task": "python_functions", "max_drop": "90 points"}],
    }
    outcome = e2e.run(project, ran, changes)
    assert outcome.ran == ["tasks", "report"]
    report = json.loads((outcome.path / "report.json").read_text())
    assert [t["name"] for t in report["tasks"]] == ["python_functions", "word_problems"]
    first = report["tasks"][0]
    assert list(first["documents"]) == ["adapter", "merged", "gptq"]
    assert {len(values) for values in first["documents"].values()} == {12}
    assert (first["metric"], first["kind"], first["reference"]) == ("acc", "multiple_choice", "adapter")
    assert report["tasks"][1]["metric"] == "exact_match,number"
    assert report["gates"][0]["status"] == "pass"
    assert "python_functions: gptq" in (outcome.path / "report.md").read_text()
    assert str(folder) not in (outcome.path / "report.json").read_text()
    assert e2e.run(project, ran, changes).ran == []
    kept = {f: f.stat().st_mtime_ns for f in (outcome.path / ".cache").glob("task-*")}
    changes["evaluate.tasks"][1]["limit"] = 5
    assert e2e.run(project, ran, changes).ran == ["tasks", "report"]
    assert all(f.stat().st_mtime_ns == at for f, at in kept.items()), "results of before stay"
    assert len(list((outcome.path / ".cache").glob("task-*"))) == 9, "three variants, one task in two sizes"


@local.needs_library
@pytest.mark.slow
def test_a_variant_that_did_not_fit_is_run_once_it_does(
    project: Path, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = local.make(tmp_path / "tasks") / "python_functions.yaml"
    changes: dict[str, Any] = {"evaluate.tasks": [{"path": str(file), "limit": 4}]}
    with monkeypatch.context() as patched:
        for room in ("evaluate.stage", "evaluate.task_stage", "run.context"):
            patched.setattr(f"requant.{room}.free_bytes", lambda _: 1000)
        done = e2e.run(project, ran, changes)
        task = json.loads((done.path / "report.json").read_text())["tasks"][0]
        assert set(task["missing"]) == {"adapter", "merged", "gptq"}
        assert e2e.run(project, ran, changes).ran == []
    assert e2e.run(project, ran, changes).ran == ["tasks", "report"]
    task = json.loads((done.path / "report.json").read_text())["tasks"][0]
    assert task["missing"] == {}
    assert list(task["documents"]) == ["adapter", "merged", "gptq"]
    assert e2e.run(project, ran, changes).ran == []


@pytest.mark.slow
def test_a_report_is_sent_once_and_a_failure_is_a_warning(
    project: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, dict[str, Any]]] = []
    answers: list[str | None] = ["no route", None]

    def send(name: str, report: dict[str, Any], files: list[Path], folder: Path) -> str | None:
        assert [f.name for f in files] == ["report.html", "report.json"]
        assert folder == ran / "pico" / "tracking"
        sent.append((name, report))
        return answers.pop(0)

    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    monkeypatch.setattr(trackers, "send", send)
    changes = {"output.track": ["wandb"]}
    told = Told()
    assert e2e.run(project, ran, changes, watcher=told).ran == ["track"]
    assert told.warnings == ["output.track: wandb: not sent (no route): the next run of the recipe tries it again"]
    assert e2e.run(project, ran, changes).ran == ["track"]
    assert e2e.run(project, ran, changes).ran == []
    assert [name for name, _ in sent] == ["wandb", "wandb"]
    assert str(project) not in json.dumps(sent[0][1])


def test_a_tracker_that_is_not_installed_is_told_before_anything_is_read(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"output\.track: mlflow is not installed: pip install mlflow-skinny"):
        e2e.run(project, tmp_path, {"output.track": ["mlflow"]})
    assert not (tmp_path / "pico").exists()
