"""Overrides of `requant.recipe.load`: a dict of plain data, or lines as `--set` takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.recipes import TEXT

from requant.errors import RecipeError
from requant.recipe import Recipe, dump, load, parse
from requant.recipe.model_sections import Nf4


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(TEXT)
    return tmp_path / "recipe.yaml"


def problems(file: Path, overrides: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(file, overrides)
    return list(caught.value.problems)


def test_a_dict_a_list_and_one_line_are_the_same(file: Path) -> None:
    wanted = load(file, {"quantize.bits": 3, "evaluate.sets.0.tokens": 100})
    assert (wanted.quantize.bits, wanted.evaluate.sets[0].tokens) == (3, 100)
    assert load(str(file), ["quantize.bits=3", "evaluate.sets.0.tokens=100"]) == wanted
    assert load(file, "quantize.bits=3") == load(file, {"quantize.bits": 3})
    assert load(file, {}) == load(file, []) == load(file)


def test_values_are_plain_data(file: Path) -> None:
    r = load(
        file,
        {
            "base": {"model": Path("./original"), "nf4": {"quant_type": "nf4", "double_quant": True}},
            "adapter.path": file.parent / "other",
            'quantize.overrides."*.down_proj"': {"bits": 8},
            "output.keep": ("gptq",),
        },
    )
    assert r.base.nf4 == Nf4(quant_type="nf4", double_quant=True)
    assert r.base.source.resolve(r.directory) == str(file.parent / "original")
    assert r.weighted_adapters[0][0].path == str(file.parent / "other")
    assert r.quantize.overrides["*.down_proj"].bits == 8
    assert r.output.keep == ("gptq",)


def test_problems_name_the_override(file: Path) -> None:
    assert problems(file, {"quantize.bits": 5}) == ["overrides: quantize.bits: 5 is not one of 2, 3, 4, 8"]
    assert problems(file, {"quantize.bits": "3"}) == ["overrides: quantize.bits: '3' is not one of 2, 3, 4, 8"]
    assert problems(file, {"quantize bits": 3}) == ["overrides: 'quantize bits': expected a key such as quantize.bits"]
    assert problems(file, {"name.first": 3}) == [
        "overrides: name.first: name is 'x', not a section: it has no key 'first'"
    ]
    (nested,) = problems(file, {"base": {"model": "./b", "nf4": {"quant_type": "int4", "double_quant": True}}})
    assert nested == "overrides: base: base.nf4.quant_type: 'int4' is not one of nf4, fp4"


def test_a_place_is_where_a_value_was_given(file: Path) -> None:
    r = load(file, {"base.model": "./other"})
    assert r.place("base", "model") == "overrides: base.model"
    assert r.place("base", "nf4") == f"{file}:2: base.nf4"
    assert load(file, ["base.model=./other"]).place("base", "model") == "--set base.model"


def test_directories_may_be_text(file: Path) -> None:
    r: Recipe = parse(TEXT, directory=str(file.parent))
    assert r == load(file)
    assert dump(r, str(file.parent)) == dump(r, file.parent)
