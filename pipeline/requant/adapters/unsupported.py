"""Adapters that have no exact merge, or none known here, told by adapter_config.json alone, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from requant.errors import InputError

MERGED = ("LORA", "LOHA", "LOKR", "VERA", "IA3", "OFT", "TRAINABLE_TOKENS")
"""The values of peft_type that are merged."""

_INPUT = "acts on the input or the activations, not on a weight: there is nothing to merge"
_OTHER = "has a weight formula that is not implemented here: merge it with PEFT on the 16-bit base first"
KINDS: Mapping[str, str] = {
    "PROMPT_TUNING": _INPUT, "MULTITASK_PROMPT_TUNING": _INPUT, "P_TUNING": _INPUT, "PREFIX_TUNING": _INPUT,
    "ADAPTION_PROMPT": _INPUT, "CPT": _INPUT, "CARTRIDGE": _INPUT, "XLORA": "mixes its adapters anew for each token",
    "POLY": "mixes its adapters by task", "LN_TUNING": _OTHER, "ADALORA": "keeps ranks that its file alone does not explain: "
    "merge it with PEFT on the 16-bit base first", "BOFT": _OTHER, "HRA": _OTHER, "FOURIERFT": _OTHER, "VBLORA": _OTHER,
    "RANDLORA": _OTHER, "SHIRA": _OTHER, "MISS": _OTHER, "BONE": _OTHER, "C3A": _OTHER, "ROAD": _OTHER, "DELORA": _OTHER,
}  # fmt: skip
"""peft_type -> why it is not merged; a type that is not here is unknown."""

_RESIDUAL_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq", "mica")
SETTINGS: Mapping[str, str] = {
    "layer_replication": "its layers are copies that do not exist in the base checkpoint",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only and has no merged form",
    "arrow_config": "Arrow routing depends on the input and has no merged form",
    "use_qalora": "QA-LoRA pools its input; merging it needs the group-wise zero points it was trained with",
    "use_bdlora": "block-diagonal LoRA is not merged yet",
    "kasa_config": "KaSA adapters change the base by its singular values; they are not merged yet",
    "velora_config": "VeLoRA adapters are not merged yet",
    "monteclora_config": "MonteCLoRA samples its weights and has no single merged form",
}
"""Key of adapter_config.json that must be unset -> why."""

_ALL = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "fan_in_fan_out", "bias",
})  # fmt: skip
_LYCORIS = {
    "r", "alpha", "rank_dropout", "rank_dropout_scale", "module_dropout", "use_effective_conv2d", "init_weights",
}  # fmt: skip
_KNOWN: Mapping[str, frozenset[str]] = {
    "LORA": _ALL | {
        "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "megatron_config", "megatron_core",
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "qalora_group_size", "runtime_config",
        "lora_bias", "ensure_weight_tying", "trainable_token_indices", "target_parameters",
    },
    "LOHA": _ALL | _LYCORIS,
    "LOKR": _ALL | _LYCORIS | {"decompose_both", "decompose_factor"},
    "VERA": _ALL | {"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"},
    "IA3": _ALL | {"feedforward_modules", "init_ia3_weights"},
    "OFT": _ALL | {
        "r", "oft_block_size", "module_dropout", "init_weights", "coft", "eps", "block_share", "use_cayley_neumann",
        "num_cayley_neumann_terms",
    },
    "TRAINABLE_TOKENS": _ALL | {"token_indices", "init_weights"},
}  # fmt: skip


def refuse(config: Mapping[str, Any], file: Path) -> None:
    """Raise InputError for every kind of adapter whose exact merge is not known here. file: adapter_config.json."""
    kind = config.get("peft_type")
    if kind not in MERGED:
        why = KINDS.get(str(kind), "is unknown here")
        raise InputError(f"{file}: peft_type is {kind!r}, which {why}. Merged are {', '.join(MERGED)}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_RESIDUAL_INITS):
        raise InputError(
            f"{file}: init_lora_weights is {init!r}: this adapter belongs to a residual base, not to the base it names. "
            "Convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) and use the result"
        )
    for key, reason in SETTINGS.items():
        if config.get(key):
            raise InputError(f"{file}: {key} is set: {reason}")
    unknown = sorted(k for k, v in config.items() if v and k not in _KNOWN[str(kind)] and k not in SETTINGS)
    if unknown:
        raise InputError(
            f"{file}: unknown settings {', '.join(unknown)} (peft_version {config.get('peft_version')}): "
            "a newer PEFT may mean something by them that merging would lose"
        )
