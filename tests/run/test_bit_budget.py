"""`requant.run.bit_budget`: mean bits kept, fused parts tied, resumed, refused early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import e2e

from requant.errors import InputError, RecipeError
from requant.evaluate import width_losses
from requant.recipe import parse
from requant.run import bit_budget, prepare, runner

BOTH = ["gptq", "compressed-tensors"]
BUDGET: dict[str, Any] = {
    "quantize": {"budget": 3.5, "group_size": 32},
    "evaluate.variants": ["adapter", "merged"],
    "heal": "off",
    "output.formats": BOTH,
}
pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_whole_run_keeps_the_mean_and_says_what_it_chose(project: Path, tmp_path: Path) -> None:
    made = e2e.run(project, tmp_path / "auto", BUDGET | {"evaluate.variants": ["adapter", "merged", "gptq"]})
    facts: Any = made.report["facts"]["quantize"]
    bits = {row["name"]: row["bits"] for row in facts["modules"]}
    units = facts["budget_units"]
    assert sum(u["bits"] * u["weights"] for u in units) / sum(u["weights"] for u in units) == facts["budget"]["mean"]
    assert 3.3 < facts["budget"]["mean"] <= 3.5
    assert len(set(bits.values())) > 1
    for block in ("model.layers.0", "model.layers.1"):
        assert len({bits[f"{block}.self_attn.{part}_proj"] for part in "qkv"}) == 1
        assert len({bits[f"{block}.mlp.{part}_proj"] for part in ("gate", "up")}) == 1
    assert facts["bits_per_weight"] > facts["budget"]["mean"], "scales come on top"
    log = (made.path / "log.txt").read_text()
    assert f"quantize.budget: {facts['budget']['why']}" in log
    assert "budget: 3.5" in (made.path / "recipe.yaml").read_text(), "the run's recipe says what was asked for"
    config = json.loads((made.path / "compressed-tensors" / "config.json").read_text())["quantization_config"]
    assert {g["weights"]["num_bits"] for g in config["config_groups"].values()} == set(bits.values())
    by_hand = {"bits": facts["settings"]["bits"], "group_size": 32, "overrides": facts["settings"]["overrides"]}
    assert facts["settings"]["budget"] is None
    again = e2e.run(project, tmp_path / "auto", BUDGET | {"quantize": by_hand}, until="quantize")
    assert again.ran == [], "the recipe that gives the bits has the same keys"


def test_a_second_run_measures_nothing(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = e2e.run(project, tmp_path, BUDGET, until="quantize")
    kept = e2e.digests(first.path / "gptq", "*.safetensors")
    monkeypatch.setattr(width_losses, "measure", lambda *_: pytest.fail("measured again"))
    assert e2e.run(project, tmp_path, BUDGET, until="quantize").ran == []
    other = BUDGET | {"quantize": {"budget": 3.7, "group_size": 32}}
    assert "quantize" in e2e.run(project, tmp_path, other, until="quantize").ran
    assert e2e.digests(first.path / "gptq", "*.safetensors") != kept


def test_the_matrix_that_loses_more_gets_more_bits(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outlier inputs: every other row of up_proj is 16 times as large, and its column of down_proj that much smaller.

    The model is the same function, but few bits round these columns to zero.
    """
    honest, block = width_losses.measure, "model.layers.1.mlp"

    def with_outliers(walk: Any, units: Any, *args: Any) -> Any:
        read = walk.checkpoint.read

        def scaled(name: str) -> Any:
            value = read(name).clone()
            if name == f"{block}.up_proj.weight":
                value[::2] *= 16
            if name == f"{block}.down_proj.weight":
                value[:, ::2] /= 16
            return value

        monkeypatch.setattr(walk.checkpoint, "read", scaled)
        return honest(walk, units, *args)

    monkeypatch.setattr(width_losses, "measure", with_outliers)
    made = e2e.run(project, tmp_path, BUDGET, until="quantize")
    stored = json.loads((made.path / ".stages.json").read_text())
    assert bit_budget.NAME in stored
    bits = {row["name"]: row["bits"] for row in stored["quantize"]["result"]["modules"]}
    assert bits[f"{block}.down_proj"] == max(bits.values()) > min(bits.values())


def test_what_a_recipe_says_of_modules_stays(project: Path, tmp_path: Path) -> None:
    own = {"*.down_proj": {"group_size": 64}, "*.layers.0.self_attn.o_proj": {"skip": True}}
    changes = BUDGET | {"quantize": {"budget": 3, "group_size": 32, "overrides": own}}
    made = e2e.run(project, tmp_path, changes, until="quantize")
    stored = json.loads((made.path / ".stages.json").read_text())["quantize"]["result"]
    rows = {row["name"]: row for row in stored["modules"]}
    assert {row["group_size"] for name, row in rows.items() if name.endswith("down_proj")} == {64}
    assert "model.layers.0.self_attn.o_proj" in stored["left"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize": {"budget": 3.5, "group_size": 32}, "output.formats": ["gptq"], "deploy": ["vllm"]},
         r"quantize\.budget: 3\.5: .* take linears of 4 and 8 bits: expected a mean from 4 to 8"),
        ({"quantize": {"budget": 3.5, "group_size": 48}}, "group_size"),
        ({"calibration.samples": 3}, r"calibration\.samples: 3: quantize\.budget measures .*: expected 4 or more"),
    ],
)  # fmt: skip
def test_a_budget_that_no_widths_give(project: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, RecipeError), match=message):
        prepare.prepare(e2e.recipe(project, tmp_path, BUDGET | changes))


def test_widths_are_those_of_the_servers(project: Path, tmp_path: Path) -> None:
    every = prepare.prepare(e2e.recipe(project, tmp_path, BUDGET))
    assert every.widths == (2, 3, 4, 8)
    assert {grid.bits for grid in every.quantize.plan.grids.values()} == {4}, "until it is measured, no narrower"
    served = {"quantize": {"budget": 5, "group_size": 32}, "output.formats": ["gptq"], "deploy": ["vllm"]}
    assert prepare.prepare(e2e.recipe(project, tmp_path, BUDGET | served)).widths == (4, 8)
    assert prepare.prepare(e2e.recipe(project, tmp_path, {"heal": "off"})).widths == ()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"budget": 3.5, "bits": 3}, r"quantize\.budget: chooses the bits of every linear, and quantize\.bits is 3"),
        ({"budget": 3.5, "bits": 4}, r"quantize\.budget: chooses the bits of every linear, and quantize\.bits is 4"),
        ({"budget": 1.5}, r"quantize\.budget"),
        ({"budget": 9}, r"quantize\.budget"),
        ({"budget": True}, r"quantize\.budget"),
        (
            {"budget": 3.5, "overrides": {"*.down_proj": {"bits": 8}}},
            "quantize.budget chooses the bits: leave them out",
        ),
    ],
)
def test_keys_that_contradict(project: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(json.dumps(e2e.changed({"quantize": section})), directory=project)


@pytest.mark.parametrize(
    ("section", "settings", "wanted"),
    [
        ({"bits": 4}, ["quantize.budget=3.5"], (4, 3.5)),
        ({"bits": 8}, ["quantize.budget=3.5"], (4, 3.5)),
        ({"budget": 3.5}, ["quantize.bits=3"], (3, None)),
        ({"budget": 3.5}, ["quantize.bits=4"], (4, None)),
        ({"bits": 8}, ["quantize.budget=null"], (8, None)),
    ],
)
def test_one_given_for_a_run_stands_in_place_of_the_files_other(
    project: Path, section: dict[str, Any], settings: list[str], wanted: tuple[int, float | None]
) -> None:
    text = json.dumps(e2e.changed({"quantize": section}))
    made = parse(text, directory=project, overrides=settings).quantize
    assert (made.bits, made.budget) == wanted
    with pytest.raises(RecipeError, match=r"--set quantize\.budget: chooses the bits"):
        parse(text, directory=project, overrides=["quantize.budget=3.5", "quantize.bits=4"])


def test_bits_beside_a_budget_are_named_with_their_line(project: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml:1[^\n]*quantize\.budget: .* quantize\.bits is 4: leave one"):
        parse(json.dumps(e2e.changed({"quantize": {"bits": 4, "budget": 3.5}})), directory=project)


def test_the_dump_of_a_recipe_is_that_recipe(project: Path, tmp_path: Path) -> None:
    made = e2e.run(project, tmp_path, BUDGET, until="quantize")
    assert runner.run(bit_budget_recipe(made.path), until="quantize").ran == []


def bit_budget_recipe(run: Path) -> Any:
    from requant.recipe import load

    return load(run / "recipe.yaml")
