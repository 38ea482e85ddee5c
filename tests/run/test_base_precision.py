"""`requant.run.base_precision`: `base.nf4` against the files; plain LoRA end to end."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.e2e import copied, edit_json, edit_tensors, recipe, run, write_recipe
from safetensors.torch import load_file

from requant import recipe as recipes
from requant.errors import InputError, RecipeError
from requant.merge.base_weights import Nf4Settings
from requant.run import base_facts, prepare, report_facts
from requant.run.base_precision import nf4_settings
from requant.run.prepared import Prepared

VARIANTS = ["base", "adapter", "merged", "rtn", "gptq"]
PLAIN: dict[str, Any] = {"base": {"model": "./original", "nf4": "none"}, "evaluate.variants": VARIANTS}


def prepared(project: Path, changes: dict[str, Any]) -> Prepared:
    return prepare.prepare(recipe(project, Path("runs"), changes))


def refusal(project: Path, changes: dict[str, Any]) -> str:
    """What `requant check` would print for a recipe file with these changes."""
    with pytest.raises((RecipeError, InputError)) as caught:
        prepare.prepare(recipes.load(write_recipe(project, changes)))
    return str(caught.value)


@pytest.mark.parametrize("base", [{"model": "./original"}, {"model": "./original", "nf4": "auto"}])
def test_a_forgotten_nf4_is_refused_with_line_key_and_both_ways_out(
    project: Path, tmp_path: Path, base: dict[str, str]
) -> None:
    said = refusal(copied(project, tmp_path / "p"), {"base": base, "evaluate.variants": VARIANTS})
    assert re.search(r"recipe\.yaml:\d+: base\.nf4: ", said)
    assert ": base.nf4: auto, the default, reads a 4-bit checkpoint, but original is a 16-bit model" in said
    assert "as if training had not quantized it" in said
    assert "nf4: {quant_type: nf4, double_quant: true}" in said
    assert "nf4: none" in said


def test_an_override_is_named_as_the_place(project: Path) -> None:
    wanted = recipes.load(project / "recipe.yaml", {"base": {"model": "./original", "nf4": "auto"}, **_variants()})
    with pytest.raises(RecipeError, match=r"^overrides: base: base\.nf4: auto"):
        prepare.prepare(wanted)


def _variants() -> dict[str, Any]:
    return {"evaluate.variants": VARIANTS}


def test_merging_onto_the_original_does_not_excuse_it(project: Path, tmp_path: Path) -> None:
    mine = copied(project, tmp_path / "p")
    shutil.copytree(project / "original", mine / "another")
    changes = {"base": {"model": "./another", "original": "./original"}, "merge.onto": "original", **_variants()}
    assert "but another is a 16-bit model" in refusal(mine, changes)


def test_none_on_a_4_bit_checkpoint_is_refused(project: Path, tmp_path: Path) -> None:
    said = refusal(copied(project, tmp_path / "p"), {"base": {"model": "./base", "nf4": "none"}, **_variants()})
    assert "base.nf4: none says that training did not quantize the base, but base is a 4-bit checkpoint" in said
    assert "write nf4: auto" in said


@pytest.mark.parametrize("nf4", ["auto", "none"])
@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "gptq", "bits": 4}, "the base is quantized with gptq"),
        ({"quant_method": "fp8"}, "says FP8, but no tensor is of 8-bit floats"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "but no tensor is stored in 4 bits"),
    ],
)
def test_other_bases_keep_their_own_words(
    project: Path, tmp_path: Path, nf4: str, quantization: dict[str, Any], says: str
) -> None:
    mine = copied(project, tmp_path / "p", "original")
    edit_json(mine / "original" / "config.json", quantization_config=quantization)
    assert says in refusal(mine, {"base": {"model": "./original", "nf4": nf4}, **_variants()})


@pytest.mark.parametrize("where", ["", "text_config."])
@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ([], "quantization_config is [], expected an object"),
        ([1], "quantization_config is [1], expected an object"),
        ("nf4", "quantization_config is 'nf4', expected an object"),
        (False, "quantization_config is False, expected an object"),
        ({"quant_method": "gptq"}, "the base is quantized with gptq"),
        ({"quant_method": ["gptq"]}, "the base is quantized with ['gptq']"),
    ],
)
def test_what_says_nothing_of_how_a_base_is_quantized(
    project: Path, tmp_path: Path, where: str, quantization: Any, says: str
) -> None:
    """transformers reads it from text_config too."""
    mine = copied(project, tmp_path / "p", "original")
    settings = {"quantization_config": quantization}
    edit_json(mine / "original" / "config.json", **({"text_config": settings} if where else settings))
    said = refusal(mine, {"base": {"model": "./original", "nf4": "none"}, **_variants()})
    assert "original/config.json: " + (where if "expected an object" in says else "") + says in said


@pytest.mark.parametrize("nf4", ["auto", "none"])
def test_an_8_bit_base_keeps_its_own_words(project: Path, tmp_path: Path, nf4: str) -> None:
    mine = copied(project, tmp_path / "p", "original")
    name = "model.layers.0.self_attn.q_proj"
    scb = {f"{name}.SCB": torch.ones(64)}
    edit_tensors(mine / "original" / "model.safetensors", lambda t: t | scb)
    said = refusal(mine, {"base": {"model": "./original", "nf4": nf4}, **_variants()})
    assert "an 8-bit bitsandbytes checkpoint" in said


def test_onto_original_is_said_to_change_nothing(project: Path) -> None:
    plan = prepared(project, PLAIN | {"merge.onto": "original"})
    assert any("merge.onto: original is the same as dequantized here" in w for w in plan.warnings)
    assert plan.merge.plan.base.checkpoint.path == project / "original"
    assert not any("merge.onto" in w for w in prepared(project, PLAIN).warnings)


@pytest.mark.parametrize(("name", "warned"), [("ann/model-bnb-4bit", True), ("ann/model", False)])
def test_an_adapter_of_a_4_bit_model_is_not_called_plain_without_a_word(
    project: Path, tmp_path: Path, name: str, warned: bool
) -> None:
    mine = copied(project, tmp_path / "p", "adapter")
    edit_json(mine / "adapter" / "adapter_config.json", base_model_name_or_path=name)
    said = "base.nf4: none, but the adapter was trained on model-bnb-4bit, a 4-bit model by its name"
    assert any(said in w for w in prepared(mine, PLAIN).warnings) is warned


def test_the_settings_of_a_section(project: Path) -> None:
    section = {"quant_type": "fp4", "double_quant": False, "skip": ["lm_head"]}
    nf4 = recipe(project, Path("runs"), {"base": {"model": "./original", "nf4": section}}).base.nf4
    assert nf4_settings(nf4) == Nf4Settings(quant_type="fp4", double_quant=False, skip=("lm_head",))
    assert nf4_settings("auto") is nf4_settings("none") is None


@pytest.mark.parametrize(("stream", "quantization"), [("never", None), ("never", {}), ("always", None)])
def test_plain_lora_on_a_16_bit_base(
    project: Path, tmp_path: Path, stream: str, quantization: dict[str, Any] | None
) -> None:
    """With a `quantization_config` that says nothing, as some tools leave it."""
    mine = copied(project, tmp_path / "p", "original")
    edit_json(mine / "original" / "config.json", quantization_config=quantization)
    outcome = run(mine, tmp_path / "runs", PLAIN | {"evaluate.stream": stream})
    stored, merged = (load_file(d / "model.safetensors") for d in (mine / "original", outcome.path / "merged"))
    adapter = load_file(mine / "adapter" / "adapter_model.safetensors")
    module = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
    wanted = stored[f"{module}.weight"].double() + 12 / 8 * b @ a
    assert torch.allclose(merged[f"{module}.weight"].double(), wanted, rtol=1e-6, atol=1e-7)

    report = outcome.report
    assert report["facts"]["base"] == {"name": "original", "nf4": "none"}
    assert report["facts"]["cost"]["bytes"]["base"] == sum(2 * t.numel() for t in stored.values())
    whole = {"base": "torch", "adapter": "torch and PEFT, unmerged"} | dict.fromkeys(("merged", "rtn", "gptq"), "torch")
    blocks = {name: f"{runtime}, block by block" for name, runtime in whole.items()}
    runtimes = {name: said.split(", computed")[0] for name, said in report["facts"]["evaluation"]["runtimes"].items()}
    assert runtimes == (blocks if stream == "always" else whole)
    assert "against 16-bit base + adapter" in report["headline"]
    step = next(e for e in report["sets"][0]["edges"] if (e["from"], e["to"]) == ("adapter", "merged"))
    assert abs(step["delta"]["value"]) < 1e-5
    text = (outcome.path / "report.md").read_text()
    apart = next(line for line in text.splitlines() if line.startswith("| 16-bit base + adapter apart |"))
    assert "an engine that serves LoRA, or PEFT" in apart
    assert "Variant adapter: 16-bit base + adapter, unmerged." in text
    card = (outcome.path / "gptq" / "README.md").read_text()
    assert "16-bit base and adapter, merged, then quantized" in card
    for page in (text, card):
        assert "QLoRA" not in page
        assert "bitsandbytes, PEFT" not in page
        assert "4-bit grid" not in page


def test_a_lost_delta_is_called_resonance_only_on_a_4_bit_grid(project: Path) -> None:
    modules: Any = [{"retention": 0.5, "delta_norm": 1.0}]
    plain, packed = prepared(project, PLAIN), prepared(project, {})
    share = "only 50% of the adapter's delta is in the quantized weights"
    assert report_facts._lost_delta(plain, modules) == [f"{share}: try another group_size"]
    assert report_facts._lost_delta(packed, modules) == [f"grid resonance: {share}: try another group_size"]


def test_the_bytes_of_a_4_bit_base_do_not_depend_on_what_is_merged_onto(project: Path) -> None:
    section = {"base": {"model": "./original", "nf4": {"quant_type": "nf4", "double_quant": True}}, **_variants()}
    onto = prepared(project, section | {"merge.onto": "original"})
    assert base_facts.base_bytes(onto) == base_facts.base_bytes(prepared(project, section))
