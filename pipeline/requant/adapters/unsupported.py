"""Refusal of peft types and settings that cannot be merged exactly, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping

from requant.adapters.config import AdapterConfig
from requant.adapters.kinds import KINDS

_INPUT = "acts on the input or the activations, not on a weight: there is nothing to merge"
_OTHER = "has a weight formula that is not implemented here: merge it with PEFT on the 16-bit base first"
REASONS: Mapping[str, str] = {
    "PROMPT_TUNING": _INPUT,
    "MULTITASK_PROMPT_TUNING": _INPUT,
    "P_TUNING": _INPUT,
    "PREFIX_TUNING": _INPUT,
    "ADAPTION_PROMPT": _INPUT,
    "CPT": _INPUT,
    "CARTRIDGE": _INPUT,
    "XLORA": "mixes its adapters anew for each token",
    "POLY": "mixes its adapters by task",
    "ADALORA": "keeps ranks that its file alone does not explain: merge it with PEFT on the 16-bit base first",
    **dict.fromkeys(("LN_TUNING", "BOFT", "HRA", "FOURIERFT", "VBLORA", "RANDLORA", "SHIRA"), _OTHER),
    **dict.fromkeys(("MISS", "BONE", "C3A", "ROAD", "DELORA"), _OTHER),
}
"""peft_type that is not in KINDS -> why it is not merged."""

COMMON = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "fan_in_fan_out", "bias",
})  # fmt: skip
"""Keys of adapter_config.json that every kind understands."""


def refuse(config: AdapterConfig) -> None:
    """Raise InputError for a peft type or a setting that has no exact merge here."""
    peft_type = config.get("peft_type")
    kind = KINDS.get(peft_type) if isinstance(peft_type, str) else None
    if kind is None:
        why = REASONS.get(str(peft_type), "is unknown here")
        raise config.error(f"peft_type is {peft_type!r}, which {why}. Merged are {', '.join(KINDS)}")
    reason = kind.why_not_merged(config)
    if reason:
        raise config.error(reason)
    unknown = sorted(key for key, value in config.items() if value and key not in COMMON | kind.settings)
    if unknown:
        raise config.error(
            f"unknown settings {', '.join(unknown)} (peft_version {config.get('peft_version')}): "
            "a newer PEFT may mean something by them that merging would lose"
        )
