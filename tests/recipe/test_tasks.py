"""Recipe section evaluate.tasks and gates on tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import e2e

from requant import recipe as recipes
from requant.errors import RecipeError


def parsed(tasks: Any, **more: Any) -> recipes.Recipe:
    changes = {"evaluate.tasks": tasks} | more
    return recipes.parse(json.dumps(e2e.changed(changes)), directory=Path())


def test_a_string_is_a_name_or_a_file() -> None:
    tasks = parsed(["gsm8k", "./tasks/words.yaml", {"path": "a.yml", "name": "own", "limit": 5}]).evaluate.tasks
    assert [(t.name, t.path, t.title) for t in tasks] == [
        ("gsm8k", None, "gsm8k"), (None, "./tasks/words.yaml", "words"), ("own", "a.yml", "own"),
    ]  # fmt: skip


def test_the_copy_of_a_recipe_has_the_same_tasks(tmp_path: Path) -> None:
    made = parsed(["gsm8k", {"path": "./tasks/words.yaml", "few_shot": 3, "chat": True}])
    again = recipes.parse(recipes.dump(made, tmp_path), directory=tmp_path)
    assert [t.title for t in again.evaluate.tasks] == ["gsm8k", "words"]
    assert again.evaluate.tasks[1].resolve(again.directory) == made.evaluate.tasks[1].resolve(made.directory)


@pytest.mark.parametrize(
    ("tasks", "more", "message"),
    [
        ([{"limit": 3}], {}, "tasks.0: expected name or path, got neither"),
        ([{"path": "a.json"}], {}, "tasks.0.path: 'a.json' does not end in one of .yaml, .yml"),
        (["gsm8k", "gsm8k"], {}, "tasks.1: 'gsm8k' is already the name of tasks.0"),
        (["in-domain"], {}, "tasks.0: 'in-domain' is already the name of sets.0"),
        ([{"name": "a", "few_shot": -1}], {}, "few_shot"),
        (
            ["a"],
            {"evaluate.variants": ["adapter", "gptq"], "evaluate.task_variants": ["merged"]},
            "merged is not scored: add it",
        ),
        (["a"], {"gates": [{"metric": "task", "task": "b", "max_drop": 2}]}, "'b' is not the name of a task: a"),
        (["a"], {"gates": [{"metric": "task", "set": "in-domain", "max": 2}]}, "task: required key is missing"),
        (["a"], {"gates": [{"metric": "task", "task": "a", "max": 2}]}, "has no max: use task and max_drop"),
        (["a"], {"gates": [{"metric": "task", "task": "a"}]}, "max_drop: required key is missing"),
        (["a"], {"gates": [{"metric": "task", "task": "a", "max_drop": "2 %"}]}, "write 2 points"),
        (["a"], {"gates": [{"metric": "ppl_increase", "task": "a", "max": "5%"}]}, "set: required key is missing"),
        (
            ["a"],
            {"gates": [{"metric": "ppl_increase", "set": "in-domain", "max": "5%", "max_drop": 1}]},
            "a gate of metric ppl_increase has no max_drop",
        ),
        (
            ["a"],
            {
                "evaluate.task_variants": ["gptq"],
                "gates": [{"metric": "task", "task": "a", "max_drop": "2 points"}],
            },
            "task compares with adapter or merged",
        ),
    ],
)
def test_what_cannot_be_meant_is_named(tasks: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parsed(tasks, **more)
    assert message in str(refused.value)


def test_a_gate_on_a_task_is_read() -> None:
    gates = [{"metric": "task", "task": "a", "max_drop": "2.5 points"}]
    assert parsed(["a"], gates=gates).gates[0].parsed().text == "drop on task a at most 2.5 points"
