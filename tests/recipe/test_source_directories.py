"""`requant.recipe.source_directories`: a directory that is something else is named as that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from requant.errors import RecipeError
from requant.recipe import parse
from requant.recipe.source_directories import near_miss, why_no_adapter, why_no_model


def fill(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}")
    directory.mkdir(exist_ok=True)
    return directory


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            [f"checkpoint-{n}/adapter_config.json" for n in (90, 1200, 300)] + ["trainer_state.json"],
            "no adapter_config.json here, but in checkpoint-1200 (the latest), checkpoint-300, checkpoint-90: give one",
        ),
        (["my_adapter/adapter_config.json"], "but in my_adapter: give one of these directories"),
        (["config.json", "model.safetensors"], "a full model (config.json, no adapter_config.json), not an adapter"),
        (["checkpoint-5/config.json"], "checkpoint-5 hold full models, not adapters"),
        (["adapter.gguf"], "adapter.gguf is a LoRA in GGUF, made for llama.cpp"),
        (["adapters.safetensors"], "an mlx-lm adapter"),
        (["adapter_0.pt"], "adapter_0.pt is torchtune's layout: convert it to PEFT's first"),
        (["pytorch_lora_weights.safetensors"], "diffusers's layout"),
        (["adapter_model.safetensors"], "no adapter_config.json beside the adapter's weights"),
        (["notes.txt"], "expected a directory written by PEFT's save_pretrained; it holds notes.txt"),
        ([], "expected a directory written by PEFT's save_pretrained; it is empty"),
    ],
)
def test_what_is_no_adapter(tmp_path: Path, names: list[str], says: str) -> None:
    assert says in str(why_no_adapter(fill(tmp_path / "a", *names)))


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "an adapter's directory (adapter_config.json, no model's weights)",
        ),
        (["config.json", "adapter_config.json", "adapter_model.safetensors"], "an adapter's directory"),
        (["config.json", "adapter_config.json", "model.safetensors"], "a model and an adapter in one directory"),
        (["checkpoint-9/config.json", "checkpoint-10/config.json"], "but in checkpoint-10 (the latest), checkpoint-9"),
        (["snapshots/0a1b/config.json"], "but in 0a1b: give one of these directories"),
        (["params.json", "consolidated.00.pth"], "the model in its maker's own layout"),
        (["model.gguf"], "only GGUF weights"),
        (["model.safetensors"], "config.json is missing: expected a model's directory"),
        ([], "config.json is missing: expected a model's directory, with config.json and safetensors; it is empty"),
    ],
)
def test_what_is_no_model(tmp_path: Path, names: list[str], says: str) -> None:
    assert says in str(why_no_model(fill(tmp_path / "m", *names)))


def test_the_base_of_an_adapter_given_as_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/name"}))
    assert str(why_no_model(tmp_path)).endswith("write the model it was trained on, owner/name")


def test_what_may_be_one_is_let_through(tmp_path: Path) -> None:
    assert why_no_model(fill(tmp_path / "m", "config.json")) is None
    assert why_no_adapter(fill(tmp_path / "a", "adapter_config.json")) is None
    (tmp_path / "a" / "adapter_config.json").write_text("[" * 10**5)
    assert why_no_adapter(tmp_path / "a") is None, "what is wrong in the file is said by its reader"


def test_mlx_is_known_by_its_settings(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}})
    )
    assert "an mlx-lm adapter, not PEFT's" in str(why_no_adapter(tmp_path))


def test_files_are_no_directories(tmp_path: Path) -> None:
    fill(tmp_path, "a.gguf", "adapter_model.safetensors")
    assert "LoRA in GGUF" in str(why_no_adapter(tmp_path / "a.gguf"))
    assert why_no_adapter(tmp_path / "adapter_model.safetensors") == (
        "a file: expected the directory that holds adapter_config.json"
    )
    assert "a GGUF file: no adapter was trained" in str(why_no_model(tmp_path / "a.gguf"))
    assert "a file: expected the directory that holds config.json" in str(
        why_no_model(tmp_path / "adapter_model.safetensors")
    )


@pytest.mark.parametrize(
    ("spelled", "says"),
    [
        ("./bas", ": did you mean ./base?"),
        ("./Base", ": did you mean ./base?"),
        ("./adaptr", ": did you mean ./adapter?"),
        ("./other", ": the directories there are adapter, base"),
        ("./nowhere/base", "{}/nowhere does not exist"),
        ("./bsae/inner", ": did you mean {}/base?"),
        ("C:\\Users\\me\\base", ": a path of Windows: write where the directory is on this machine"),
        ("./C:\\Users\\me\\base", ": a path of Windows: write where the directory is on this machine"),
    ],
)
def test_near_misses(tmp_path: Path, spelled: str, says: str) -> None:
    fill(tmp_path, "base/config.json", "adapter/adapter_config.json")
    assert says.format(tmp_path) in near_miss(spelled, tmp_path / spelled)


def test_adapters_and_models_are_named_first(tmp_path: Path) -> None:
    fill(tmp_path, *(f"a{n}/notes" for n in range(6)), "model/config.json", "tuned/adapter_config.json")
    says = ": the directories there are tuned, model, a0, a1, a2 and 3 others"
    assert near_miss("./nope", tmp_path / "nope") == says


def test_the_recipe_says_what_a_path_of_windows_is(tmp_path: Path) -> None:
    text = "name: x\nbase: {model: 'C:\\models\\base'}\nadapter: ./a\n"
    with pytest.raises(RecipeError) as caught:
        parse(text, directory=tmp_path)
    assert caught.value.problems[-1] == (
        "recipe.yaml:2: base.model: 'C:\\\\models\\\\base' is neither an existing path nor a hub id (owner/name): "
        "a path of Windows: write where the directory is on this machine"
    )
