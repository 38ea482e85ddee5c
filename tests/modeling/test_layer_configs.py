"""`requant.modeling.layer_configs`: numbers of a layer, where layers differ."""

from __future__ import annotations

from helpers import tiny

from requant.deploy.tensor_parallel import Heads
from requant.modeling.layer_configs import layer_config, layer_configs


def test_layers_that_are_alike_have_one_config() -> None:
    config = tiny.config("llama")
    assert layer_configs(config) == [config]
    assert layer_config(config, "model.layers.1.mlp.up_proj") is config


def test_heads_are_those_of_the_layer() -> None:
    """Gemma 4: full attention has wider heads, and fewer of keys; the config of the whole does not say."""
    text = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 1}
    config = tiny.config("gemma4", **{f"text_config.{k}": v for k, v in text.items()} | {
        "text_config.attention_k_eq_v": True, "text_config.per_layer_config": {2: {"head_dim": 32, "num_key_value_heads": 1}},
    })  # fmt: skip
    name = "model.language_model.layers.{}.self_attn.k_proj"
    assert [Heads.of(config, name.format(n)) for n in range(3)] == [Heads(8, 4), Heads(8, 4), Heads(8, 1)]
    assert Heads.all_of(config) == {Heads(8, 4), Heads(8, 1)}
    assert layer_config(config, name.format(2)).head_dim == 32
    assert Heads.of(config, "lm_head") == Heads(8, 4)
