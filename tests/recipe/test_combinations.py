"""`requant.recipe.combinations`: recipes and names of a sweep, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.recipes import TEXT

from requant import recipe as recipes
from requant.errors import RecipeError
from requant.recipe.combinations import LONGEST, MOST, Combination, combinations


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(TEXT)
    return tmp_path / "recipe.yaml"


def made(file: Path, *settings: str) -> tuple[Combination, ...]:
    return combinations(partial(recipes.load, file), settings)


def refused(file: Path, *settings: str) -> str:
    with pytest.raises(RecipeError) as error:
        made(file, *settings)
    return str(error.value)


def names(file: Path, *settings: str) -> list[str]:
    return [one.recipe.name for one in made(file, *settings)]


def test_every_combination_is_a_recipe_with_its_values(file: Path) -> None:
    found = made(file, "quantize.bits=3,4", "quantize.group_size=32,64", "quantize.sweeps=1")
    grids = [(one.recipe.quantize.bits, one.recipe.quantize.group_size) for one in found]
    assert grids == [(3, 32), (3, 64), (4, 32), (4, 64)], "the last key changes first"
    assert {one.recipe.quantize.sweeps for one in found} == {1}, "a single value is that of all"
    assert [one.path.name for one in found] == [
        "x-bits3-group_size32", "x-bits3-group_size64", "x-bits4-group_size32", "x-bits4-group_size64",
    ]  # fmt: skip
    assert str(found[0]) == "x-bits3-group_size32 (quantize.bits=3, quantize.group_size=32)"
    for one in found:
        alone = [f"{setting}" for setting in (*one.settings, "quantize.sweeps=1", f"name={one.recipe.name}")]
        assert one.recipe == recipes.load(file, alone), "as --set gives it"


def test_values_are_read_as_set_reads_them(file: Path) -> None:
    found = made(file, "evaluate.variants=[base, adapter],[adapter, gptq]", "quantize.correct=0,0.25")
    assert [one.recipe.evaluate.variants for one in found[::2]] == [("base", "adapter"), ("adapter", "gptq")]
    assert [one.recipe.quantize.correct for one in found[:2]] == [0, 0.25]
    assert names(file, "quantize.symmetric=true,false") == ["x-symmetrictrue", "x-symmetricfalse"]
    assert names(file, "quantize.group_size=-1,128") == ["x-group_size-1", "x-group_size128"]
    assert names(file, "heal=off,{steps: 3}") == ["x-healoff", "x-healsteps3"]


def test_values_of_python(file: Path) -> None:
    settings: Mapping[str, Any] = {"quantize.bits": [3, 4], "adapter": (Path("a"), Path("b"))}
    found = combinations(partial(recipes.load, file), settings)
    assert [one.recipe.name for one in found] == ["x-bits3-adaptera", "x-bits3-adapterb", "x-bits4-adaptera",
                                                  "x-bits4-adapterb"]  # fmt: skip
    assert [one.recipe.adapter.path for one in found[:2] if one.recipe.adapter] == ["./a", "./b"]
    for wrong in (3, "3,4", {"a": 1}):
        with pytest.raises(RecipeError, match=r"quantize\.bits: expected a list of values"):
            combinations(partial(recipes.load, file), {"quantize.bits": wrong})  # type: ignore[dict-item]


def test_keys_of_the_same_last_step_are_told_apart(file: Path) -> None:
    found = names(file, "calibration.length=128,256", "heal.length=64,128")
    assert found[0] == "x-calibration.length128-heal.length64"


def test_a_name_of_its_own_is_taken(file: Path) -> None:
    with pytest.raises(RecipeError, match=r"a \(name=a\) and b \(name=b\) ask for the same"):
        made(file, "name=a,b")
    assert names(file, "name=y", "quantize.bits=3,4") == ["y-bits3", "y-bits4"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["quantize.bits="], "--set quantize.bits: no values"),
        (["quantize.bits=3,"], "--set quantize.bits=3,: there is no value after the last comma"),
        (["quantize.bits"], "--set quantize.bits: expected key.path=value"),
        (["quantize.bits=3"], "a sweep combines the values of a key"),
        ([], "a sweep combines the values of a key"),
        (["quantize.bits=3,4", "quantize.bits=8"], "--set quantize.bits: given twice"),
        (["quantize.bits=3,[4"], "--set quantize.bits: '[3,[4\\n]' is not valid YAML"),
        (["quantize.bitz=3,4"], "quantize.bitz=3: --set quantize.bitz: unknown key, did you mean 'bits'?"),
        (["quantize.bits=3,99"], "quantize.bits=99: --set quantize.bits: 99 is not one of"),
        (["quantize.bits=3,0x3"], "x-bits3 (quantize.bits=3) and x-bits3 (quantize.bits=3) ask for the same"),
        (["adapter.path=./a,.//a"], "would be the same run, runs/x-patha"),
        (["calibration.samples=" + ",".join(map(str, range(1, MOST + 2)))], f"{MOST + 1} combinations: at most {MOST}"),
        (["name=" + "n" * (LONGEST - 5), "quantize.bits=3,4"], f"{LONGEST + 1} characters, at most {LONGEST}"),
    ],
)
def test_what_is_no_sweep_is_refused(file: Path, settings: list[str], said: str) -> None:
    assert said in refused(file, *settings)


def test_two_names_for_one_directory_are_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x-bits3").mkdir()
    (tmp_path / "runs" / "x-bits4").symlink_to("x-bits3")
    assert "would be the same run" in refused(file, f"output.dir={tmp_path}/runs", "quantize.bits=3,4")
