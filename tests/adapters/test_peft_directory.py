"""`requant.adapters.peft_directory`: what is read and refused; every message has the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import pico
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from requant.adapters import peft_directory
from requant.adapters.config import pattern_value
from requant.errors import InputError

Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    pico.train(pico.model(), tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        peft_directory.load(path)
    return str(caught.value)


def test_what_peft_writes_is_read(adapter: Path) -> None:
    loaded = peft_directory.load(adapter)
    assert sorted(loaded.folds) == [f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in ("q_proj", "v_proj")]
    fold = loaded.folds["model.layers.0.self_attn.v_proj"]
    assert (fold.shape, fold.scaling, fold.magnitude, fold.bias) == ((32, 64), 6 / 4, None, None)
    assert sum(len(f.tensors) for f in loaded.folds.values()) == len(loaded.tensors) == 8
    assert not loaded.replaced


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING', which acts on the input"),
        ({"peft_type": "ADALORA"}, "keeps ranks that its file alone does not explain"),
        ({"peft_type": "BOFT"}, "a weight formula that is not implemented here"),
        ({"peft_type": "NEWEST"}, "'NEWEST', which is unknown here. Merged are LORA, LOHA"),
        ({"peft_type": "IA3"}, "unknown settings"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "pissa"}, "belongs to a residual base"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "residual base"),
        ({"init_lora_weights": "loftq"}, "residual base"),
        ({"init_lora_weights": "lora_ga"}, "residual base"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is set: its layers are copies"),
        ({"use_bdlora": {"a": 1}}, "block-diagonal LoRA"),
        ({"kasa_config": {"a": 1}}, "singular values"),
        ({"velora_config": {"a": 1}}, "VeLoRA"),
        ({"monteclora_config": {"a": 1}}, "samples its weights"),
        ({"init_lora_weights": "mica"}, "residual base"),
        ({"r": "4"}, "r is '4', expected a whole number above 0"),
        ({"alora_invocation_tokens": [1]}, "no merged form"),
        ({"arrow_config": {"a": 1}}, "no merged form"),
        ({"use_qalora": True}, "QA-LoRA"),
        ({"use_hyperlora": True, "zeta": 3}, "unknown settings use_hyperlora, zeta (peft_version"),
        ({"lora_alpha": None}, "lora_alpha is None, expected a number"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', expected a number"),
        ({"r": 8}, "is 8 there, 4 in adapter_model.safetensors"),
        ({"rank_pattern": {"q_proj": 16}}, "rank of model.layers.0.self_attn.q_proj is 16 there, 4 in"),
        ({"use_dora": True}, "use_dora is True but model.layers"),
    ],
)
def test_what_cannot_be_merged_exactly_is_refused(adapter: Path, changes: dict[str, Any], message: str) -> None:
    pico.edit_adapter(adapter, **changes)
    assert message in refused(adapter)


@pytest.mark.parametrize(
    "changes", [{"use_hyperlora": False}, {"new_list": []}, {"inference_mode": False}, {"init_lora_weights": "eva"}]
)
def test_unset_unknown_settings_change_nothing(adapter: Path, changes: dict[str, Any]) -> None:
    pico.edit_adapter(adapter, **changes)
    assert len(peft_directory.load(adapter).folds) == 4


def test_magnitudes_without_dora_are_refused(adapter: Path) -> None:
    pico.edit_tensors(adapter / peft_directory.WEIGHTS, add={f"{Q}.lora_magnitude_vector": torch.ones(64)})
    assert "use_dora is False but model.layers.0.self_attn.q_proj has" in refused(adapter)


def test_half_a_pair_is_refused(adapter: Path) -> None:
    pico.edit_tensors(adapter / peft_directory.WEIGHTS, drop=[f"{Q}.lora_B.weight"])
    assert "model.layers.0.self_attn.q_proj has lora_A but not both lora_A and lora_B" in refused(adapter)


@pytest.mark.parametrize("cut", [lambda t: t[:, :3], lambda t: t[..., None], lambda t: t[0]])
def test_factors_that_do_not_multiply_are_refused(adapter: Path, cut: Any) -> None:
    pico.edit_tensors(adapter / peft_directory.WEIGHTS, change={f"{Q}.lora_B.weight": cut})
    assert "do not multiply (linear layers, and convolutions in one group)" in refused(adapter)


def test_a_file_without_tensors_is_refused(adapter: Path) -> None:
    save_file({}, adapter / peft_directory.WEIGHTS)
    assert refused(adapter).endswith("adapter_model.safetensors: holds no tensors")


def test_a_file_with_copies_of_the_base_alone_is_refused(adapter: Path) -> None:
    save_file({"base_model.model.lm_head.original_module.weight": torch.zeros(2, 2)}, adapter / peft_directory.WEIGHTS)
    assert "no LoRA tensors found among 1, e.g. 'base_model.model.lm_head.original_module.weight'" in refused(adapter)


def test_what_a_key_may_mean_is_said_with_its_file(adapter: Path) -> None:
    save_file({"lora_A.weight": torch.zeros(2, 2)}, adapter / peft_directory.WEIGHTS)
    assert "adapter_model.safetensors: " in refused(adapter)
    assert "names no module" in refused(adapter)


def test_trained_tokens_beside_something_else_are_refused(tmp_path: Path) -> None:
    config = peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[1, 5], task_type="CAUSAL_LM")
    pico.train(pico.model(), tmp_path / "adapter", config=config)
    key = "base_model.model.model.embed_tokens.lora_A.weight"
    pico.edit_tensors(tmp_path / "adapter" / peft_directory.WEIGHTS, add={key: torch.zeros(4, 64)})
    message = refused(tmp_path / "adapter")
    assert "model.embed_tokens has trained tokens and lora_A, trainable_tokens_delta" in message


def test_a_magnitude_of_another_length_is_refused(tmp_path: Path) -> None:
    """DoRA's magnitude of another length than the rows is refused, not broadcast."""
    pico.train(pico.model(), tmp_path / "adapter", use_dora=True)
    pico.edit_tensors(
        tmp_path / "adapter" / peft_directory.WEIGHTS, change={f"{Q}.lora_magnitude_vector": lambda t: t[:1]}
    )
    assert "q_proj" in refused(tmp_path / "adapter")


def test_directories_that_are_no_adapter(adapter: Path, tmp_path: Path) -> None:
    assert "no such adapter directory" in refused(tmp_path / "absent")
    (adapter / peft_directory.WEIGHTS).rename(adapter / "adapter_model.bin")
    assert "a pickle; requant never loads pickles" in refused(adapter)
    (adapter / "adapter_model.bin").unlink()
    assert "adapter_model.safetensors: missing" in refused(adapter)
    (adapter / "adapter_config.json").unlink()
    assert "no adapter_config.json; expected a directory written by PEFT's save_pretrained" in refused(adapter)


def test_old_key_spellings(adapter: Path) -> None:
    """Adapter names inside keys (older PEFT) and without the prefix mean the same tensors."""
    from safetensors.torch import load_file, save_file

    before = peft_directory.load(adapter)
    tensors = load_file(adapter / peft_directory.WEIGHTS)
    old = {k.replace(".weight", ".default.weight"): v for k, v in tensors.items()}
    save_file(old, adapter / peft_directory.WEIGHTS)
    assert peft_directory.load(adapter).folds.keys() == before.folds.keys()


NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.10.mlp.down_proj", "lm_head", "transformer.h.1.attn.c_attn"]
PATTERNS = [
    "q_proj",
    r"layers\.1",
    r".*\.0\..*",
    "proj",
    r"model\.layers\.\d+\.mlp\.down_proj",
    "down_proj",
    "lm_head",
    "c_.*",
]


@given(st.lists(st.sampled_from(PATTERNS), unique=True), st.sampled_from(NAMES))
def test_patterns_match_as_in_peft(patterns: list[str], module: str) -> None:
    values = {p: i for i, p in enumerate(patterns)}
    expected = values.get(get_pattern_key(values.keys(), module), "default")
    assert pattern_value(values, module, "default") == expected
