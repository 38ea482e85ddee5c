"""Tiny configs of any model type of transformers: sizes cut by the names of settings.

`pico` spells the settings of a few families; this takes whatever transformers registers, for sweeps over all of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from requant.modeling import rotary_functions

VOCABULARY = 256
WIDTH = 64
LARGEST = 30_000_000  # parameters: more are no tiny model, some size is not cut

# The first pattern that matches the whole name of a setting gives its size, at most: smaller defaults stay.
_SIZES = tuple(
    (re.compile(pattern), size)
    for pattern, size in (
        (r"vocab_size_per_layer_input", VOCABULARY),
        (r"(.*_)?vocab_size", VOCABULARY),
        (r"qk_rope_head_dim", 32),
        (r".*hidden_size_per_layer_input|.*_low_rank_dim|.*_lora_rank|.*_rank_dim", 32),
        (r"qk_nope_head_dim|v_head_dim|rotary_dim|mamba_d_head|mamba_head_dim|mamba_d_state", 16),
        (r"qk_head_dim", 48),
        (r"index_head_dim", 32),
        (r"(.*_)?head_dim|kv_channels|d_kv|d_head|ssm_state_size|state_size|mamba_state_size", 16),
        (
            r"(.*_)?(hidden_size|d_model|n_embd|n_embed|embed_dim|dim|hidden_dim|embedding_size|width|projection_dim"
            r"|word_embed_proj_dim|rnn_width|lru_width|decoder_hidden_size)",
            WIDTH,
        ),
        (
            r"(.*_)?(intermediate_size|ffn_dim|dim_ff|d_ff|dff|n_inner|ffn_hidden_size|intermediate_dim|mlp_dim|inner_dim)",
            128,
        ),
        (r"mamba_d_ssm", 128),
        (r"(num_hidden_layers|n_layers?|num_layers|depth|n_blocks|num_blocks|.*_num_hidden_layers)", 2),
        (r"((encoder|decoder)_layers|num_(encoder|decoder|self_attention|block|text|vision)_?layers)", 2),
        (r"linear_num_key_heads|index_n_heads|num_key_value_heads|n_kv_heads|num_kv_heads|multi_query_group_num", 2),
        (r"mamba_n_heads|mamba_num_heads", 8),
        (r"mamba_dt_rank|time_step_rank|index_topk", 8),
        (r"(.*_)?(num_attention_heads|n_heads?|num_heads|attention_heads|linear_num_value_heads)", 4),
        (r"(.*_)?(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts)", 4),
        (r"(.*_)?(num_experts_per_tok(en)?|moe_topk|moe_top_k|top_k_experts|moe_k)", 2),
        (r"(n_group|topk_group|num_expert_group|mamba_n_groups|n_groups|first_k_dense_replace|num_dense_layers)", 1),
        (r"(n_shared_experts|num_shared_experts|moe_num_shared_experts|moe_layer_start_index)", 1),
        (r"(max_position_embeddings|n_positions|max_seq_len|max_sequence_length|max_(source|target)_positions)", 128),
        (r"(.*_)?(sliding_window|attention_chunk_size|window_size|mamba_chunk_size|chunk_size)", 16),
        (r"image_size|input_size", 32),
        (r"(.*_)?patch_size", 8),
        (r"num_groups|groups", 4),
    )
)

# What the rules get wrong, by model type: settings that depend on each other. "text_config.x" is a setting inside.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 2}
_LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
_MROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [2, 3, 3]}
_GLMROPE = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
_GEMMA4 = {
    "num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "per_layer_config": {2: {"head_dim": 32}}, "hidden_size_per_layer_input": 32,
}  # fmt: skip
_QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention"], "num_hidden_layers": 2, "indexer_n_heads": 1,
    "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 8, "indexer_compress_ratio": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "hc_lowrank": 32,
    "ngram_vocab_size_base": VOCABULARY, "split_ngram_parts": 4, "make_ngram_vocab_size_divisible_by": 8,
}  # fmt: skip
_COMPASS = {
    "rope_parameters": {k: {"rope_theta": 1e4, "rope_type": "default"} for k in ("full_attention", "sliding_attention")},
    "layer_types": ["full_attention", "sliding_attention"], "head_dim": 16, "logit_scale": 0.25,
}  # fmt: skip
_INKLING = {
    "sliding_window_size": 16, "d_rel": 8, "rel_extent": 32, "num_hidden_layers": 2, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
}  # fmt: skip
_INKLING2 = _INKLING | {"n_layers_per_attn_res_block": 1, "unpadded_vocab_size": VOCABULARY}
_DOTS3 = {
    "num_hidden_layers": 2, "layer_types": ["indexed_attention", "sliding_attention"], "head_dim": 48,
    "mlp_layer_types": ["dense", "sparse"], "per_layer_config": {},
}  # fmt: skip
_ZAMBA = {
    "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 128,
    "attention_head_dim": 32,
}  # fmt: skip
_CHANGES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": _MAMBA | _LAYERS | {"shared_intermediate_size": 128, "position_embedding_type": "rope"},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "gemma3n_text": {
        "intermediate_size": [128] * 4, "num_kv_shared_layers": 1, "num_hidden_layers": 4, "laurel_rank": 32,
        "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gemma4": {f"text_config.{k}": v for k, v in _GEMMA4.items()},
    "gemma4_unified": {f"text_config.{k}": v for k, v in _GEMMA4.items()},
    "qwen2_vl": {"text_config.rope_parameters": _MROPE},
    "qwen2_5_vl": {"text_config.rope_parameters": _MROPE, "vision_config.fullatt_block_indexes": [1]},
    "qwen2_5_omni_thinker": {"text_config.rope_parameters": _MROPE},
    "paddleocr_vl": {"text_config.rope_parameters": _MROPE},
    "glm4v": {"text_config.rope_parameters": _GLMROPE},
    "glm4v_moe": {"text_config.rope_parameters": _GLMROPE, "text_config.head_dim": 16},
    "glm46v": {"text_config.rope_parameters": _GLMROPE},
    "glm_ocr": {"text_config.rope_parameters": _GLMROPE},
    "glmga": {"text_config.rope_parameters": _GLMROPE},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "ministral": {"head_dim": 16},
    "mistral4": {"qk_rope_head_dim": 16, "head_dim": 32, "qk_head_dim": 32, "kv_lora_rank": 32},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "nemotron": {"num_key_value_heads": 2},
    "helium": {"head_dim": 16},
    "codegen": {"rotary_dim": 8, "n_ctx": 128},
    "gptj": {"rotary_dim": 8},
    "xlnet": {"d_head": 16},
    "olmo_hybrid": {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 4,
                    "linear_num_value_heads": 4},  # transformers cuts what it saves into equal parts
    "reformer": {
        "is_decoder": True, "axial_pos_embds": False, "attention_head_size": 16, "feed_forward_size": 128,
        "attn_layers": ["local", "local"], "local_attn_chunk_length": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "blt": {
        "encoder_config.hidden_size_global": WIDTH, "decoder_config.hidden_size_global": WIDTH, "use_cache": False,
        "encoder_hash_byte_group_vocab": 512, "encoder_hash_byte_group_size": [3, 4],
    },
    "florence2": {
        "vision_config.embed_dim": [16, 16, 32, 32], "vision_config.depths": [1] * 4,
        "vision_config.num_heads": [2, 2, 4, 4], "vision_config.num_groups": [2, 2, 4, 4],
    },
    "janus": {
        "vq_config.base_channels": 32, "vq_config.channel_multiplier": [1, 1], "vq_config.num_res_blocks": 1,
        "vq_config.latent_channels": 32, "vq_config.num_embeddings": 64, "vq_config.image_token_embed_dim": WIDTH,
    },
    "cosmos3_edge": {"text_config.rope_parameters": _MROPE},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": _MROPE | {"mrope_section": [3, 3, 2]}},
    "longcat_flash": {"zero_expert_num": 2, "num_attention_heads": 4, "expert_ffn_hidden_size": 64},
    "glm5_next": {"text_config.index_topk": 16},
    "recurrent_gemma": {"use_cache": False, "num_hidden_layers": 3},
    "step3p7": {"text_config.sliding_window": 16},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "molmo2": {
        "adapter_config.vision_feature_layer": [1, 0],
        "text_config.additional_vocab_size": VOCABULARY,  # transformers cuts what it saves into equal parts
    },
    "chameleon": {"vocabulary_map": {"<image>": 4}},
    "emu3": {
        "vocabulary_map": {"<image>": 4}, "vq_config.base_channels": 32, "vq_config.channel_multiplier": [1, 1],
        "vq_config.num_res_blocks": 1, "vq_config.attn_resolutions": [],
    },
    "mllama": {"text_config.num_hidden_layers": 3, "text_config.cross_attention_layers": [1]},
    "qwen4_exp_text": _QWEN4,
    "qwen4_exp": {f"text_config.{k}": v for k, v in _QWEN4.items()},
    "hunyuan_vl": {
        "text_config.head_dim": 16,
        "text_config.rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2] * 4},
    },
    "cohere_compass_text": _COMPASS,
    "cohere_compass": {f"text_config.{k}": v for k, v in _COMPASS.items()},
    "deepseek_ocr2": {
        "vision_config.sam_config.global_attn_indexes": [1], "text_config.num_experts_per_tok": 2,
        "text_config.mlp_layer_types": ["dense", "sparse"], "text_config.head_dim": 16, "text_config.n_group": 1,
        "text_config.moe_intermediate_size": 64, "text_config.topk_group": 1,
    },
    "granite4_vision": {
        "deepstack_layer_map": [[0, 0], [1, 1]], "downsample_rate": "1/2", "spatial_target_layers": [0, 1],
        "text_config.head_dim": 16,
    },
    "inkling_text": _INKLING,
    "inkling_mm_model": {f"text_config.{k}": v for k, v in _INKLING.items()} | {
        "text_config.mlp_layer_types": ["dense", "sparse"],
    },
    "inkling2": {f"text_config.{k}": v for k, v in _INKLING2.items()},
    "inkling2_text": _INKLING2,
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8, "head_dim": 16},
    "dots3_note_text": _DOTS3,
    "dots3_note": {f"text_config.{k}": v for k, v in _DOTS3.items()} | {"audio_config.adapter_input_size": WIDTH},
    "fast_vlm": {
        "vision_config.hidden_size": 128,
        "vision_config.model_args": {"inference_mode": True, "layers": [1] * 5, "embed_dims": [16, 16, 16, 32, 64]},
    },
    "xlstm": {"chunk_size": 8, "embedding_dim": WIDTH, "num_blocks": 2, "qk_dim_factor": 1.0, "max_inference_chunksize": 32},
    "perception_lm": {
        "vision_config.architecture": "vit_pe_core_tiny_patch16_384",
        "vision_config.model_args": {
            "embed_dim": WIDTH, "depth": 1, "num_heads": 2, "global_pool": "", "img_size": [32, 32],
            "use_post_transformer_norm": False, "init_values": 0.1, "ref_feat_shape": [2, 2],
        },
    },
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA | {"mamba_headdim": 16, "num_query_groups": 4, "hybrid_layer_ids": [1, 3], "adapter_rank": 32},
}  # fmt: skip
_CHANGES["gemma3n"] = {f"text_config.{k}": v for k, v in _CHANGES["gemma3n_text"].items()} | {
    "vision_config.model_args": {"channel_multiplier": 0.05, "num_features": 64},  # of timm's MobileNet V5
}


def kinds() -> dict[str, str]:
    """Model type -> class of every causal LM and every text-writing multimodal model, by transformers' own lists."""
    found = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    found |= dict(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    found["shieldgemma2"] = "ShieldGemma2ForImageClassification"  # the class that its files name: a classifier
    return {k: v if isinstance(v, str) else v[0] for k, v in sorted(found.items())}


# What transformers makes no config of a model type without.
_NEEDED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    }
}


def default_config(kind: str) -> Any:
    """The config of a model type as transformers makes it, with what it does not make one without."""
    return transformers.AutoConfig.for_model(kind, **_NEEDED.get(kind, {}))


def config(kind: str, **changes: Any) -> Any:
    """The tiny config of a model type."""
    default = default_config(kind)
    given = _cut(default.to_dict())
    for key in ("transformers_version", "architectures", "dtype", "quantization_config"):
        given.pop(key, None)
    for name, value in (_CHANGES.get(kind, {}) | changes).items():
        *path, leaf = name.split(".")
        place = given
        for part in path:
            place = place[part]
        place[leaf] = value
    return type(default).from_dict(given)


def model(kind: str, *, seed: int = 0, **changes: Any) -> Any:
    """A random fp32 model in eval mode: norms and biases random, blocks strong enough to move the residual stream."""
    settings, made_by = config(kind, **changes), getattr(transformers, kinds()[kind])
    with torch.device("meta"):
        size = sum(p.numel() for p in made_by(settings).parameters())
    if size > LARGEST:
        raise ValueError(f"{kind} has {size} parameters: not tiny")
    torch.manual_seed(seed)
    with rotary_functions.of_model_classes():
        made = made_by(settings).float().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.ndim == 2 and "embed" not in name and "lm_head" not in name:
                parameter.mul_(2.5)
    return made


def _cut(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with every size cut; lists by layer are cut with the number of layers."""
    layers = next((settings[k] for k in ("num_hidden_layers", "num_layers", "n_layer") if settings.get(k)), None)
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and key not in ("rope_parameters", "rope_scaling", "id2label", "label2id"):
            found[key] = _cut(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            found[key] = _size(key, value)
        elif isinstance(value, list) and layers and len(value) == layers:
            found[key] = value
        else:
            found[key] = value
    _cut_lists(found, settings, layers)
    if isinstance(own := settings.get("per_layer_config"), Mapping):
        count = next((found[k] for k in ("num_hidden_layers", "num_layers", "n_layer") if found.get(k)), 0)
        found["per_layer_config"] = {k: v for k, v in own.items() if int(k) < count}
    if found.get("kv_lora_rank") and "qk_rope_head_dim" in found:  # latent attention: the width of what is rotated
        found["num_key_value_heads"] = found["num_attention_heads"]
        found["head_dim"] = found["qk_rope_head_dim"]
    return found


def _size(key: Any, value: int) -> int:
    key = str(key)
    if re.fullmatch(r".*(token_id|token_index|_id)s?", key):
        return value if value < VOCABULARY else VOCABULARY - 6
    size = next((size for pattern, size in _SIZES if pattern.fullmatch(key)), value)
    return min(size, value) if value > 0 else value


def _cut_lists(found: dict[str, Any], settings: Mapping[str, Any], layers: int | None) -> None:
    """One entry a layer: each kind once, then the kinds again; as many layers as there are kinds, at least two."""
    if not layers:
        return
    key = next(k for k in ("num_hidden_layers", "num_layers", "n_layer") if settings.get(k))
    by_layer = {k: v for k, v in settings.items() if isinstance(v, list) and len(v) == layers}
    kinds = [len({repr(x) for x in v}) for k, v in by_layer.items() if all(isinstance(x, str) for x in v)]
    count = max([found[key], *kinds])
    found[key] = count
    for name, values in by_layer.items():
        distinct = list({repr(x): x for x in values}.values())
        found[name] = (distinct * count)[:count]
