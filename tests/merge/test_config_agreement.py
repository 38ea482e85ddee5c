"""`requant.merge.config_agreement`: a config.json of other weights is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import pico, tiny
from helpers.e2e import edit_json, edit_tensors

from requant.adapters import peft_directory
from requant.checkpoint.model_files import edit_config
from requant.checkpoint.reader import Checkpoint, read_json
from requant.errors import InputError
from requant.merge.base_weights import BaseWeights
from requant.merge.config_agreement import lacking_buffers
from requant.modeling import skeleton
from requant.run import prepare


def planned(tmp_path: Path, kind: str = "llama", **changes: Any) -> None:
    made = pico.model(kind)
    pico.save(made, tmp_path / "base")
    pico.train(made, tmp_path / "adapter", target_modules="all-linear")
    edit_json(tmp_path / "base" / "config.json", **changes)
    prepare.plan_merge(tmp_path / "base", peft_directory.load(tmp_path / "adapter"), None, trust_remote_code=False)


@pytest.mark.parametrize("kind", ["llama", *pico._OTHER])
def test_every_family_agrees_with_its_own(tmp_path: Path, kind: str) -> None:
    planned(tmp_path, kind)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "buffer"), [("glm4_moe", "e_score_correction_bias"), ("lfm2_moe", "expert_bias")])
def test_a_routers_bias_that_the_base_lacks_is_told(tmp_path: Path, kind: str, buffer: str) -> None:
    """GLM 4.5's was lost by tools that save parameters alone."""
    base = pico.save(tiny.model(kind), tmp_path / "base")
    model = skeleton.open_model(base)
    assert not lacking_buffers(BaseWeights(Checkpoint(base)), model)
    edit_tensors(base / "model.safetensors", lambda t: {n: v for n, v in t.items() if buffer not in n})
    (warning,) = lacking_buffers(BaseWeights(Checkpoint(base)), model)
    assert "lacks 1 of the buffers" in warning
    assert f".{buffer}: transformers starts without" in warning


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "qwen3_5", "mamba", "gpt2", "falcon_h1"])
def test_no_family_lacks_buffers_of_its_own(tmp_path: Path, kind: str) -> None:
    base = pico.save(tiny.model(kind), tmp_path / "base")
    assert not lacking_buffers(BaseWeights(Checkpoint(base)), skeleton.open_model(base))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": 10}, "model.embed_tokens.weight is [96, 64] instead of [10, 64]; lm_head.weight is [96, 64]"),
        ({"hidden_size": 0}, "model.embed_tokens.weight is [96, 64] instead of [96, 0]"),
        ({"num_hidden_layers": 3}, "model.layers.2.self_attn.q_proj.weight [64, 64] is missing"),
        ({"intermediate_size": 96}, "mlp.gate_proj.weight is [128, 64] instead of [96, 64]"),
        ({"num_key_value_heads": 4}, "self_attn.k_proj.weight is [32, 64] instead of [64, 64]"),
    ],
)
def test_another_models_config_is_refused(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        planned(tmp_path, **changes)
    assert "config.json does not describe these weights: " in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 10**6}, r"num_hidden_layers is 1000000, the weights are \d+ tensors"),
        ({"num_experts": 10**9}, "num_experts is 1000000000, the weights are"),
        ({"text_config": {"n_layer": 10**6}}, "text_config.n_layer is 1000000, the weights are"),
        ({"num_labels": 10**8}, "num_labels is 100000000, expected at most 100000"),
        ({"sliding_window": "x"}, "sliding_window is 'x', expected a whole number or null"),
        ({"head_dim": 10**9}, r"head_dim is 1000000000, the largest tensor has \d+ elements"),
        ({"num_attention_heads": 10**9}, "num_attention_heads is 1000000000, the largest tensor"),
    ],
)
def test_sizes_that_no_weights_explain_are_refused_before_anything_is_built(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=rf"base/config\.json: {says}"):
        planned(tmp_path, **changes)


@pytest.mark.parametrize("value", [False, 0, None])
def test_how_a_forward_returns_its_results_is_not_taken_from_the_file(tmp_path: Path, value: Any) -> None:
    """transformers' own forward reads outputs by name, and fails on tuples."""
    planned(tmp_path, return_dict=value)
    assert skeleton.load_config(tmp_path / "base").return_dict is True


def test_two_heads_where_the_config_ties_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"tie_word_embeddings, but lm_head\.weight has other values than model\.embed"
    ):
        planned(tmp_path, tie_word_embeddings=True)


def test_sizes_of_no_weight_are_free(tmp_path: Path) -> None:
    planned(tmp_path, max_position_embeddings=10**9, sliding_window=10**9, chunk_size=10**9, pad_token_id=5)


def test_kernels_that_a_config_asks_for_are_never_loaded(tmp_path: Path) -> None:
    """`user/repository` is code that transformers would download: nowhere to be found, so loading it would raise."""
    planned(tmp_path, _attn_implementation="no/such", experts_implementation="no/such", attn_implementation="no/such:f")
    config = edit_config(read_json(tmp_path / "base" / "config.json"), dtype="bfloat16")
    assert [key for key in config if "implementation" in key] == []
    assert config["hidden_size"] == 64


@pytest.mark.parametrize("value", ["x", 3, [1], {"a": 1}, None, True])
@pytest.mark.parametrize("key", ["hidden_act", "rope_parameters", "text_config", "torch_dtype", "id2label", "auto_map"])
def test_wrong_types_are_errors_of_ours_or_nothing(tmp_path: Path, made: Path, key: str, value: object) -> None:
    base = Path(shutil.copytree(made / "base", tmp_path / "base"))
    edit_json(base / "config.json", **{key: value})
    try:
        prepare.plan_merge(base, peft_directory.load(made / "adapter"), None, trust_remote_code=False)
    except InputError as error:
        said = str(error)
    else:
        said = "config.json"
    assert "config.json" in said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made")
    planned(path)
    return path
