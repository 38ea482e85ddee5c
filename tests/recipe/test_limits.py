"""What is no recipe: bombs, numbers and names without a bound, files that never end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.recipes import TEXT

from requant.errors import RecipeError
from requant.recipe import Recipe, load, named_files, parse
from requant.recipe.yaml_nodes import DEEPEST, LARGEST, MOST


def laughs(levels: int, times: int = 10) -> str:
    """Each line stands for the one before it so many times."""
    first = "a0: &a0 [x]\n"
    return first + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * times)}]\n" for i in range(1, levels))


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        parse(text, overrides=overrides, directory=".")
    shown = list(raised.value.problems)
    assert all(len(line) < 400 and line.isprintable() for line in shown)
    return shown


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (laughs(9), f"recipe.yaml:11: more than {MOST:,} values, aliases (*name) counted"),
        ("x: &x [a]\ny: [" + "*x, " * MOST + "*x]", f"recipe.yaml:8: more than {MOST:,} values"),
        ("z: [" + "1, " * MOST + "1]", f"recipe.yaml:7: more than {MOST:,} values"),
        ("z: " + "[" * 100_000, f"recipe.yaml:7: more than {DEEPEST} sections or lists in each other"),
        ("z: " + "{a: " * 2000 + "1" + "}" * 2000, f"recipe.yaml:7: more than {DEEPEST} sections"),
        ("z:\n" + "".join(" " * (i + 1) + "a:\n" for i in range(500)), f"more than {DEEPEST} sections"),
        ("# " + "x" * LARGEST, f"a recipe has at most {LARGEST:,}"),
    ],
    ids=["aliases of aliases", "many aliases", "many values", "open lists", "flow", "block", "comment"],
)
def test_bombs_end_in_one_line(extra: str, message: str) -> None:
    (line,) = problems(TEXT + extra)
    assert message in line


def test_aliases_that_a_recipe_may_use_are_read() -> None:
    text = TEXT.replace("./a.txt", "&a ./a.txt").replace("calibration:", "heal: {seed: 1}\ncalibration:")
    text += "canaries: {path: ./c.jsonl}\noutput: {keep: &k [merged, gptq]}\n"
    assert parse(text, directory=".").output.keep == ("merged", "gptq")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("heal.steps=1000000", "1000000 is not a number of at most 100000"),
        ("heal={steps: 100000, batch: 4096}", "heal.steps: 100,000 steps of 4,096 windows of 512 tokens are"),
        ("heal.batch=1000000000", "is not a number of at most 4096"),
        ("heal.steps=" + "9" * 5000, "is not a whole number"),
        ("calibration.samples=0x" + "f" * 5000, "calibration.samples"),
        ("calibration.length=1e400", "is not a whole number"),
        ("evaluate.window=1000000000000", "is not a number of at most 1048576"),
        ("evaluate.batch=1000000000000", "is not auto or a number of at most 1000000000"),
        ("evaluate.sets.0.tokens=99999999999999999999", "is not a number of at most 1000000000"),
        ("device=cuda:99999999999999999999", "is not one of auto, cpu, cuda, cuda:N"),
        ("merge.max_shard=" + "9" * 400 + "GB", "is not a size"),
        ("name=" + "a" * 300, "is not text of at most 100 characters"),
        ("base.model=./" + "a" * 5000, "is not text of at most 4000 characters"),
        ('name="\\0"', "name: holds a control character or half of a character (U+0000)"),
        ('output.dir="/tmp/a\\0b"', "output.dir: holds a control character or half of a character (U+0000)"),
        ('output.dir="/tmp/\\ud800"', "output.dir: holds a control character or half of a character (U+D800)"),
        ('calibration.data.path="./\\e[31m.jsonl"', "data.path: holds a control character"),
        ("calibration.data.path=./\udc80.jsonl", "data.path"),
        ('quantize.overrides={"a\\u0007": {bits: 4}}', "holds a control character or half of a character (U+0007)"),
        ("gates=[{metric: perplexity, set: held-out, max: '" + "9" * 400 + "'}]", "expected at most 1e+09"),
    ],
)
def test_values_without_a_bound_are_refused(override: str, message: str) -> None:
    assert any(message in line for line in problems(TEXT, override))


def test_a_variable_brings_no_control_character(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "secret\x1b[31m")
    line = problems(TEXT.replace("./base", "'${env:HERE}'"))[0]
    assert "base.model: holds a control character" in line
    assert "secret" not in line


def test_only_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    for file in (tmp_path / "pipe.yaml", Path("/dev/zero")):
        with pytest.raises(RecipeError, match="cannot be read: a device or a pipe, expected a file"):
            load(file)
    (tmp_path / "large.yaml").write_bytes(b"#" * (LARGEST + 1))
    with pytest.raises(RecipeError, match="expected at most"):
        load(tmp_path / "large.yaml")


def test_texts_that_are_no_files_are_named_with_their_keys(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to("/dev/zero")
    (tmp_path / "c.jsonl").mkdir()
    (tmp_path / "recipe.yaml").write_text(TEXT + "canaries: ./c.jsonl\n")
    recipe: Recipe = load(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError) as raised:
        named_files.check(recipe)
    pipe, device, directory = raised.value.problems
    assert pipe.endswith(
        "recipe.yaml:4: calibration.data.path: " + f"{tmp_path}/a.txt: a device or a pipe, expected a file"
    )
    assert "evaluate.sets.0.data.path" in device
    assert directory.endswith("c.jsonl: a directory, expected a file")
