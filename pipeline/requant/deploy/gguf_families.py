"""The table of model families that are written as GGUF: names, order of rows, metadata.

Read off llama.cpp's convert_hf_to_gguf.py and the package `gguf` (2026-11-29). Others are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from requant.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How one model type of transformers is written.

    architecture: llama.cpp's name of it. interleaved: whether its rotary embedding turns neighbouring rows of queries
    and keys, where transformers turns rows of the two halves of a head. vocabulary: whether llama.cpp wants its size.
    norms_less_one: whether the file of transformers holds weights of norms less one. period: of blocks, the last of
    which sees everything where the others see a window; 0: all see everything.
    """

    architecture: str
    interleaved: bool = False
    vocabulary: bool = False
    norms_less_one: bool = False
    period: int = 0


FAMILIES: Mapping[str, Family] = {
    "llama": Family(architecture="llama", interleaved=True, vocabulary=True),
    "mistral": Family(architecture="llama", interleaved=True, vocabulary=True),
    "qwen2": Family(architecture="qwen2"),
    "qwen3": Family(architecture="qwen3"),
    "gemma3_text": Family(architecture="gemma3", norms_less_one=True, period=6),
}
_ROTATIONS = ("default", "linear", "llama3")


def family_of(config: Any, where: str) -> Family:
    """The family of a transformers config; InputError for one that is not written, or with settings that are not.

    where: the checkpoint, for the message.
    """
    kind = str(config.model_type)
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(f"{where}: a {kind[:80]} is not written as GGUF yet: only {known} are")
    rotation = _rotation(config).get("rope_type", "default")
    if rotation not in _ROTATIONS:
        raise InputError(
            f"{where}: rotary embeddings of type {str(rotation)[:80]!r} are not written as GGUF: only "
            f"{', '.join(_ROTATIONS)}"
        )
    if FAMILIES[kind].period:
        _refuse_other_windows(config, FAMILIES[kind].period, where)
        return FAMILIES[kind]
    window = getattr(config, "sliding_window", None)
    if isinstance(window, int) and window < config.max_position_embeddings:
        raise InputError(
            f"{where}: a sliding window of {window} tokens is not written as GGUF: its {kind} has none there"
        )
    return FAMILIES[kind]


def _refuse_other_windows(config: Any, period: int, where: str) -> None:
    """Raise InputError for a Gemma 3 whose settings are not those that llama.cpp takes without asking the file."""
    head = config.head_dim
    expected = {
        "query_pre_attn_scalar": head,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "layer_types": ["full_attention" if (i + 1) % period == 0 else "sliding_attention"
                        for i in range(config.num_hidden_layers)],
    }  # fmt: skip
    found = {key: getattr(config, key, None) for key in expected}
    local = config.rope_parameters["sliding_attention"].get("rope_type", "default")
    if getattr(config, "use_bidirectional_attention", False) or local != "default":
        raise InputError(f"{where}: attention both ways, or {str(local)[:80]!r} in windows, is not written as GGUF")
    for key, value in expected.items():
        if found[key] != value:
            raise InputError(f"{where}: {key} is {str(found[key])[:80]}, GGUF's gemma3 has {str(value)[:80]}")


def metadata(config: Any, family: Family) -> dict[str, int | float]:
    """Key without the architecture -> value: unsigned integers and fp32 numbers."""
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    rotation = _rotation(config)
    found: dict[str, int | float] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.freq_base": float(rotation["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
    }
    if family.period:
        found |= {
            "attention.sliding_window": config.sliding_window,
            "rope.freq_base_swa": float(config.rope_parameters["sliding_attention"]["rope_theta"]),
        }
    if family.vocabulary:
        found |= {"vocab_size": config.vocab_size, "rope.dimension_count": head}
    return found


def scaling(config: Any) -> float | None:
    """The factor by which positions are stretched linearly; None: they are not."""
    rotation = _rotation(config)
    return float(rotation["factor"]) if rotation.get("rope_type") == "linear" else None


def frequency_factors(config: Any) -> Tensor | None:
    """What llama.cpp divides each frequency by, fp32 [head/2]; None: nothing.

    Llama 3's rule: long wavelengths by `factor`, short ones by 1, those between by a smooth step.
    """
    rotation = _rotation(config)
    if rotation.get("rope_type") != "llama3":
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    base, factor = rotation["rope_theta"], rotation["factor"]
    low, high = rotation["low_freq_factor"], rotation["high_freq_factor"]
    seen = rotation["original_max_position_embeddings"]
    factors = []
    for i in range(0, head, 2):
        wavelength = 2 * math.pi * base ** (i / head)
        smooth = min(1.0, max(0.0, (seen / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


def rows(config: Any, family: Family, module: str, count: int) -> Tensor | None:
    """The order in which the rows of a query or key projection are written, int64 [count]; None: as they are."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    number = heads.get(module.rpartition(".")[2]) if family.interleaved else None
    if number is None:
        return None
    return torch.arange(count).reshape(number, 2, count // number // 2).transpose(1, 2).flatten()


def _rotation(config: Any) -> dict[str, Any]:
    """The rotary embedding's settings; where blocks have two, that of those which see everything."""
    found = getattr(config, "rope_parameters", None) or {}
    return dict(found.get("full_attention", found))
