"""Tests of `requant.run.stages`: the list itself, and the walk over made-up stages."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from requant.checkpoint.run_directory import RunDirectory
from requant.run import runner
from requant.run.context import RunContext
from requant.run.observer import Outcome, Watcher
from requant.run.runner import Runner
from requant.run.stages import STAGES, Stage, stages_of


def test_a_stage_needs_only_stages_before_it() -> None:
    context = cast(
        RunContext,
        SimpleNamespace(
            prepared=SimpleNamespace(heal=None, tasks=None),
            recipe=_asked(),
            scores=SimpleNamespace(missing=lambda: {"rtn": []}),
        ),
    )
    names = [stage.name for stage in STAGES]
    assert len(set(names)) == len(names)
    needs = {stage.name: stage.needs(context) for stage in STAGES}
    assert needs["evaluate"] == needs["quantize"] == ("merge",)
    assert all(names.index(other) < names.index(name) for name, others in needs.items() for other in others)


@pytest.mark.parametrize(
    ("heal", "suggest", "formats", "names"),
    [
        (None, False, "gptq", "merge quantize evaluate report"),
        (object(), False, "gptq", "merge quantize heal evaluate report"),
        (None, True, "gptq", "merge quantize evaluate suggest report"),
        (object(), True, "gptq", "merge quantize heal evaluate suggest report"),
        (object(), False, "gptq compressed-tensors", "merge quantize heal compressed-tensors evaluate report"),
        (None, False, "gptq gguf", "merge quantize gguf evaluate report"),
    ],
)
def test_stages_of_a_run(heal: object, suggest: bool, formats: str, names: str) -> None:
    asked = _asked(formats=tuple(formats.split()))
    prepared: Any = SimpleNamespace(heal=heal, recipe=asked, tasks=None)
    assert [stage.name for stage in stages_of(prepared, suggest=suggest)] == names.split()


def test_tasks_come_before_the_report_and_trackers_after_it() -> None:
    prepared: Any = SimpleNamespace(heal=None, recipe=_asked(track=("wandb",)), tasks=object())
    names = [stage.name for stage in stages_of(prepared)]
    assert names == ["merge", "quantize", "evaluate", "tasks", "report", "track"]


@pytest.mark.parametrize(
    ("roads", "stages"),
    [(("rtn",), []), (("rtn", "nf4-merge"), ["roads"]), (("gptqmodel", "nf4-again"), ["gptqmodel", "roads"])],
)
def test_roads_are_scored_after_the_variants_and_before_tasks(roads: tuple[str, ...], stages: list[str]) -> None:
    prepared: Any = SimpleNamespace(heal=None, recipe=_asked(roads=roads), tasks=object())
    names = [stage.name for stage in stages_of(prepared)]
    assert names == ["merge", "quantize", "evaluate", *stages, "tasks", "report"]


def _asked(
    *, formats: tuple[str, ...] = ("gptq",), track: tuple[str, ...] = (), roads: tuple[str, ...] = ()
) -> SimpleNamespace:
    return SimpleNamespace(output=SimpleNamespace(formats=formats, track=track), evaluate=SimpleNamespace(roads=roads))


class World:
    """Two stages in a run directory: `first` writes a discardable artifact that `second` needs."""

    def __init__(self, path: Path, *, keep: tuple[str, ...], announced: list[tuple[str, bool]]) -> None:
        watcher = Watcher()
        watcher.stage = lambda name, done: announced.append((name, done))  # type: ignore[method-assign]
        self.keys = {"first": "a", "second": "b"}
        context: Any = SimpleNamespace(
            directory=RunDirectory(path), recipe=SimpleNamespace(output=SimpleNamespace(keep=keep)),
            device=torch.device("cpu"), watcher=watcher, outcome=Outcome(path), event=lambda **event: None,
        )  # fmt: skip
        self.context: RunContext = context
        self.first = Stage(
            name="first", key=lambda _: self.keys["first"], function=self.write, artifact="weights", discardable=True
        )
        self.second = Stage(
            name="second", key=lambda _: self.keys["second"], function=lambda *_: {"x": 1}, needs=lambda _: ("first",)
        )

    def write(self, context: RunContext, key: str) -> dict[str, Any]:
        artifact = context.directory.artifact("weights")
        (artifact.begin(key) / "w").write_text("w")
        artifact.finish(key, {})
        return {}

    def walk(self) -> list[str]:
        self.context.outcome.ran.clear()
        Runner(self.context).run((self.first, self.second))
        return list(self.context.outcome.ran)


@pytest.mark.parametrize("kept", [True, False])
def test_a_discarded_artifact_is_written_again_only_when_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    announced: list[tuple[str, bool]] = []
    world = World(tmp_path, keep=("weights",) if kept else (), announced=announced)
    monkeypatch.setattr(runner, "stage_named", lambda _: world.first)
    with world.context.directory.open():
        assert world.walk() == ["first", "second"]
        assert announced == [("first", False), ("second", False)]
        world.context.directory.artifact("weights").remove()
        announced.clear()
        assert world.walk() == (["first"] if kept else [])
        assert announced == [("first", not kept), ("second", True)]
        world.context.directory.artifact("weights").remove()
        world.keys["second"] = "c"
        announced.clear()
        assert world.walk() == ["first", "second"]
        assert announced == ([] if kept else [("first", True)]) + [("first", False), ("second", False)]


def test_results_are_stored_with_what_they_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, keep=("weights",), announced=[])
    monkeypatch.setattr(runner, "stage_named", lambda _: world.first)
    scratch: list[Path] = []

    def resumes(context: RunContext, key: str) -> dict[str, Any]:
        scratch.append(context.directory.scratch("second", key))
        scratch[0].mkdir()
        return {"x": 1}

    world.second = dataclasses.replace(world.second, function=resumes, scratch=True)
    with world.context.directory.open():
        world.walk()
    stored = json.loads((tmp_path / ".stages.json").read_text())["second"]
    assert stored["key"] == "b"
    assert list(stored["result"])[:2] == ["x", "seconds"]
    assert not scratch[0].exists(), "it is of no use once the result is stored"
