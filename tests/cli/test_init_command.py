"""`requant.cli.init_command`: a recipe in a new file, and none that exists is changed."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from helpers.command_line import Here
from helpers.e2e import copied

from requant import recipe as recipes
from requant.run.check.input_widths import input_widths, known_positions


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(monkeypatch, capsys)


def test_output_writes_a_new_file(here: Here, project: Path, tmp_path: Path) -> None:
    mine = copied(project, tmp_path / "p", "adapter")
    here.monkeypatch.chdir(mine)
    (mine / "recipes").mkdir()
    assert here("init", "./adapter") == 0
    printed = here.out
    assert here("init", "./adapter", "-o", "mine.yaml") == 0
    assert here.out.startswith("mine.yaml written: edit the lines marked FIXME, then `requant check mine.yaml`\n")
    assert (mine / "mine.yaml").read_text() == f"# yaml-language-server: $schema=requant.schema.json\n{printed}"
    assert not list(mine.glob(".mine*"))
    assert here("init", "./adapter", "--output", "recipes/other.yaml") == 0
    r = recipes.load("recipes/other.yaml")
    assert r.weighted_adapters[0][0].resolve(r.directory) == str(mine / "adapter")
    assert (r.quantize.group_size, r.name) == (64, "adapter-w4g64")


def test_editors_find_the_schema_beside_the_recipe(here: Here, project: Path, tmp_path: Path) -> None:
    """Nothing but `init -o` is needed; a schema that lies there is the user's."""
    mine = copied(project, tmp_path / "p", "adapter")
    here.monkeypatch.chdir(mine)
    before = set(os.listdir(mine))
    assert here("init", "./adapter") == 0
    assert "schema" not in here.out
    assert set(os.listdir(mine)) == before, "stdout alone"
    (mine / "recipes").mkdir()
    assert here("init", "./adapter", "-o", "recipes/one.yaml") == 0
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", (mine / "recipes" / "one.yaml").read_text())
    assert named
    schema = mine / "recipes" / named[1]
    assert json.loads(schema.read_text()) == recipes.json_schema()
    assert "recipes/requant.schema.json written" in here.out
    assert here("init", "./adapter", "-o", "recipes/two.yaml") == 0
    assert here.out.endswith("recipes/requant.schema.json is there already, for editors\n")
    schema.write_text('{"title": "of an older version"}')
    assert here("init", "./adapter", "-o", "recipes/three.yaml") == 0
    assert "requant.schema.json is not this version's, and is left as it is: `requant schema > " in here.out
    assert schema.read_text() == '{"title": "of an older version"}'


def test_an_edited_recipe_is_never_emptied(here: Here, project: Path, tmp_path: Path) -> None:
    here.monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: edited\n")
    (tmp_path / "link.yaml").symlink_to("nowhere.yaml")
    for name in ("recipe.yaml", "link.yaml", "."):
        assert here("init", str(project / "adapter"), "-o", name) == 2
        assert here.err == f"error: {name}: exists, and is left as it is: choose another name, or remove it first\n"
    assert (tmp_path / "recipe.yaml").read_text() == "name: edited\n"
    assert not (tmp_path / "nowhere.yaml").exists()


def test_a_recipe_that_cannot_be_made_leaves_no_file(here: Here, tmp_path: Path) -> None:
    here.monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text("{")
    assert here("init", "./bad", "-o", "recipe.yaml") == 2
    assert here("init", "./bad", "-o", "no/recipe.yaml") == 2
    assert here.err == "error: no/recipe.yaml: there is no directory no: make it first\n"
    assert os.listdir(tmp_path) == ["bad"]


@pytest.mark.parametrize(
    ("config", "widths"),
    [
        ({"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}, {576, 1536}),
        ({"model_type": "gpt2", "n_embd": 96, "n_head": 4}, {96, 384}),
        ({"model_type": "no-such-model"}, set()),
        ({"model_type": "llama", "hidden_size": "many"}, set()),
    ],
)
def test_widths_are_those_of_the_model_class(tmp_path: Path, config: dict[str, object], widths: set[int]) -> None:
    small = {"num_hidden_layers": 2, "n_layer": 2, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | small))
    assert input_widths(tmp_path) == widths


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"model_type": "llama", "max_position_embeddings": 256}, 256),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"model_type": "mamba"}, None),
        ({"model_type": "no-such-model", "n_positions": 1024}, None),
    ],
)
def test_positions_are_those_of_the_config(tmp_path: Path, config: dict[str, object], positions: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert known_positions(tmp_path) == positions


def test_windows_of_a_new_recipe_fit_the_positions_of_the_base(here: Here, project: Path, tmp_path: Path) -> None:
    mine = copied(project, tmp_path / "p")
    here.monkeypatch.chdir(mine)
    assert here("init", "./adapter", "-o", "mine.yaml") == 0
    recipe = recipes.load("mine.yaml")
    assert (recipe.calibration.length, recipe.evaluate.window) == (256, 256)
    assert (mine / "mine.yaml").read_text().count("default 2048; the base has 256 positions") == 2
