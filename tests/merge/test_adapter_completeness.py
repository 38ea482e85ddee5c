"""`requant.merge.adapter_completeness`: what the settings name and the file lacks is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from safetensors.torch import load_file, save_file

from requant.adapters import peft_directory
from requant.adapters.weight_files import WEIGHTS
from requant.errors import InputError
from requant.evaluate import peft_runtime
from requant.merge import adapter_completeness
from requant.run import prepare

LLAMA = [f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in ("q_proj", "v_proj")]


def notes(tmp_path: Path, drop: str, kind: str = "llama", **settings: Any) -> list[str]:
    """What is said of an adapter whose tensors with `drop` in their keys are lost."""
    made = pico.model(kind)
    pico.save(made, tmp_path / "base")
    pico.train(made, tmp_path / "adapter", **settings)
    return of_files(tmp_path, drop)


def of_files(tmp_path: Path, drop: str = "", **changes: Any) -> list[str]:
    file = tmp_path / "adapter" / WEIGHTS
    if drop:
        save_file({n: t for n, t in load_file(file).items() if drop not in n}, file)
    if changes:
        pico.edit_adapter(tmp_path / "adapter", **changes)
    adapter = peft_directory.load(tmp_path / "adapter")
    plan, model = prepare.plan_merge(tmp_path / "base", adapter, None, trust_remote_code=False)
    adapter_completeness.check_vocabulary([adapter], plan, model)
    return adapter_completeness.missing(adapter, plan, model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q|v)_proj"},
        {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"rank_pattern": {"q_proj": 2}},
    ],
)
@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
def test_a_whole_adapter_lacks_nothing(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    if kind == "gpt2":
        settings = {"target_modules": "all-linear"}
    assert notes(tmp_path, "", kind, **settings) == []


@pytest.mark.parametrize(
    ("settings", "drop", "lost"),
    [
        ({}, ".layers.1.", LLAMA[2:]),
        ({"target_modules": r".*\.(q|v)_proj"}, ".layers.1.", LLAMA[2:]),
        ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, ".layers.1.", LLAMA[3:]),
        ({"target_modules": ["q_proj", "v_proj", "lm_head"]}, "lm_head", ["lm_head"]),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens", ["model.embed_tokens"]),
    ],
)
def test_lost_targets_are_named(tmp_path: Path, settings: dict[str, Any], drop: str, lost: list[str]) -> None:
    (note,) = notes(tmp_path, drop, **settings)
    count = "1 module" if len(lost) == 1 else f"{len(lost)} modules"
    assert note.startswith(f"the adapter's file lacks {count} (it holds ")
    assert f": {', '.join(lost)}: the settings target them" in note


def test_all_linear_names_what_is_lost(tmp_path: Path) -> None:
    (note,) = notes(tmp_path, ".layers.1.", target_modules="all-linear")
    assert "lacks 7 modules (it holds 7): model.layers.1.self_attn.q_proj" in note
    assert "and 3 more" in note
    assert "lm_head" not in note


def test_a_rank_of_zero_is_a_module_left_out_on_purpose(tmp_path: Path) -> None:
    notes(tmp_path, ".layers.1.")
    assert of_files(tmp_path, rank_pattern={r"layers\.1\..*": 0}) == []


def test_lost_modules_to_save(tmp_path: Path) -> None:
    """PEFT itself ends with a KeyError there: `check` refuses, not the probe after the merge."""
    says = (
        r"adapter_model\.safetensors: lacks 1 module \(it holds 5\): lm_head: modules_to_save of adapter_config\.json"
    )
    with pytest.raises(InputError, match=says):
        notes(tmp_path, "lm_head", modules_to_save=["lm_head", "norm"])


def test_lost_rows_of_trained_tokens(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no rows of trained tokens, though trainable_token_indices names some"):
        notes(tmp_path, "trainable_tokens_delta", trainable_token_indices={"embed_tokens": [3, 4]})


def test_fused_experts_are_one_module_for_peft(tmp_path: Path) -> None:
    """PEFT of transformers 5 has no single experts to adapt: that the file has none is no loss."""
    assert notes(tmp_path, "", "mixtral", target_modules="all-linear") == []


@pytest.mark.parametrize(
    ("kind", "changes", "where"),
    [
        ("mixtral", {}, "mlp.experts"),
        (
            "gpt_oss",
            {"num_local_experts": 4, "intermediate_size": 96, "head_dim": 16, "num_experts_per_tok": 2},
            "mlp.experts",
        ),
    ],
)
def test_stacked_experts(tmp_path: Path, kind: str, changes: dict[str, Any], where: str) -> None:
    made = pico.model(kind, **changes)
    pico.save(made, tmp_path / "base")
    both = [f"{where}.{leaf}" for leaf in ("gate_up_proj", "down_proj")]
    pico.train(made, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=both)
    assert of_files(tmp_path) == []
    for part, held in ((f"layers.1.{where}.base_layer", 4), (f"layers.1.{where}", 3)):
        says = f"lacks 1 module .it holds {held}.: model.layers.1.{where}: target_parameters of adapter_config.json"
        with pytest.raises(InputError, match=says):
            of_files(tmp_path, part)


def test_single_experts_by_their_old_names(tmp_path: Path) -> None:
    """Trained under transformers 4: experts one by one, called w1 to w3."""
    base = pico.model("mixtral")
    pico.save(base, tmp_path / "base")
    names = [f"model.layers.{i}.block_sparse_moe.experts.{e}.w{n}" for i in (0, 1) for e in range(4) for n in (1, 2, 3)]
    shapes = {
        f"w{n}": (base.config.hidden_size, base.config.intermediate_size)[:: 1 if n != 2 else -1] for n in (1, 2, 3)
    }
    tensors = {}
    for name in names:
        inputs, outputs = shapes[name[-2:]]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(2, inputs)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(outputs, 2)
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    assert of_files(tmp_path) == []
    (note,) = of_files(tmp_path, "layers.1.block_sparse_moe.experts.2.")
    assert "lacks 3 modules (it holds 21): model.layers.1.mlp.experts.2.gate_proj" in note


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("rows", [90, 100])
def test_one_end_of_the_vocabulary_alone_is_refused(tmp_path: Path, end: str, rows: int) -> None:
    notes(tmp_path, "", modules_to_save=["embed_tokens", "lm_head"])
    file = tmp_path / "adapter" / WEIGHTS
    whole = load_file(file)

    def resized(ends: tuple[str, ...]) -> None:
        change = {n: torch.ones(rows, t.shape[1]) for n, t in whole.items() if any(e in n for e in ends)}
        save_file(whole | change, file)

    resized((end,))
    with pytest.raises(InputError, match=rf"resizes one end of the vocabulary alone: .*{end}.weight {rows} rows"):
        of_files(tmp_path)
    resized(("embed_tokens", "lm_head"))
    assert of_files(tmp_path) == []


@pytest.mark.parametrize(
    "changes", [{"target_modules": ["q_proj"]}, {"target_modules": None}, {"layers_to_transform": 0}]
)
def test_modules_that_the_settings_do_not_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    """PEFT leaves them out without a word; the merge takes what the file holds, and says so."""
    notes(tmp_path, "")
    (note,) = of_files(tmp_path, **changes)
    assert note.startswith("the adapter's file holds ")
    assert "that target_modules does not match: merged, though PEFT leaves out" in note
    plan, _ = prepare.plan_merge(
        tmp_path / "base", peft_directory.load(tmp_path / "adapter"), None, trust_remote_code=False
    )
    live = peft_runtime.attach(pico.reload(tmp_path / "base"), plan)
    assert sum(n.endswith("lora_A.default") for n, _ in live.named_modules()) == 4


def test_other_outer_names_are_matched_as_trained(tmp_path: Path) -> None:
    """A regular expression is about the names of training: the base's outer names are others."""
    notes(tmp_path, "")
    file = tmp_path / "adapter" / WEIGHTS
    renamed = {
        n.replace("model.model.layers", "model.model.language_model.layers"): t for n, t in load_file(file).items()
    }
    save_file(renamed, file)
    pattern = r"model\.language_model\.layers\..*(q|v)_proj"
    assert of_files(tmp_path, target_modules=pattern) == []
    (note,) = of_files(tmp_path, ".layers.1.")
    assert "lacks 2 modules (it holds 2): model.layers.1.self_attn.q_proj" in note


def test_the_variant_adapter_has_no_weights_of_pefts_own(tmp_path: Path) -> None:
    """PEFT fills what the file lacks; the variant that judges the merge may have none of that."""
    made = pico.model()
    pico.save(made, tmp_path / "base")
    pico.train(made, tmp_path / "adapter", init_lora_weights=False)
    of_files(tmp_path, ".layers.1.")
    adapter = peft_directory.load(tmp_path / "adapter")
    plan, _ = prepare.plan_merge(tmp_path / "base", adapter, None, trust_remote_code=False)
    with torch.no_grad():
        live = peft_runtime.attach(pico.reload(tmp_path / "base"), plan)
        assert {n for n, _ in live.named_modules() if n.endswith("lora_A")} == {
            f"base_model.model.model.layers.0.self_attn.{p}.lora_A" for p in ("q_proj", "v_proj")
        }
