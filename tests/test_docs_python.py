"""The examples of docs/python.md, in order, in one interpreter, on a small model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.e2e import copied, one_thread, texts, write_recipe

import requant

PAGE = Path(__file__).resolve().parents[1] / "docs" / "python.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
STAGES = ("Merge", "Quantize", "Heal", "Evaluate", "Verify", "Report")


def test_every_stage_has_an_example() -> None:
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))
    assert sections.keys() == set(STAGES)
    assert all("```python" in text for text in sections.values())


@pytest.mark.slow
def test_the_examples_run(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = copied(project, tmp_path / "p")
    monkeypatch.chdir(mine)
    variants = ["base", "adapter", "merged", "rtn", "gptq"]
    write_recipe(mine, {"base": {"model": "./base"}, "evaluate.variants": variants})
    (mine / "train.txt").write_text("\n\n".join(texts()["train"]))
    (mine / "heldout.txt").write_text("\n\n".join(texts()["heldout"]))
    names: dict[str, Any] = {}
    with one_thread():
        for number, example in enumerate(EXAMPLES):
            exec(compile(example, f"docs/python.md, example {number + 1}", "exec"), names)
    assert names["recipe"].quantize.bits == 8
    assert names["proof"].ok
    assert names["scores"]["gptq"].kl.mean() > 0
    assert names["stored"]["headline"] == names["outcome"].report["headline"]
    assert (names["outcome"].path / "healed" / "config.json").exists()


FACE = """
import json, sys
import requant
heavy = [m for m in ("torch", "transformers", "pydantic") if m in sys.modules]
names = {name: repr(getattr(requant, name)) for name in requant.__all__}
from requant import Outcome, Recipe, load, run
import requant.run as package
from requant import run as again
from requant.run import Outcome as outcome, run as function
try:
    run("nowhere.yaml")
except requant.errors.RecipeError as error:
    said = str(error)
print(json.dumps([heavy, run is package is again, Outcome is outcome, said]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", ["", "import requant.run", "from requant.run import prepare", "from requant import run"]
)
def test_the_face_is_light_and_run_can_be_called_whatever_came_first(first: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{first}\n{FACE}"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    heavy, same, outcome, said = json.loads(done.stdout.splitlines()[-1])
    assert bool(heavy) is bool(first)
    assert same
    assert outcome
    assert said.startswith("nowhere.yaml: no such file")


def test_the_face_has_nothing_else() -> None:
    with pytest.raises(AttributeError, match="'requant' has no attribute 'walk'"):
        requant.walk  # noqa: B018
    assert set(requant.__all__) <= set(dir(requant))
