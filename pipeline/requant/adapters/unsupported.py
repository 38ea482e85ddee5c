"""Refusal of peft types and settings that cannot be merged exactly, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping

from requant.adapters import setting_types
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


NO_MEANING = frozenset({
    "metadata", "unsloth_version", "transformers_version", "torch_dtype", "lora_B_layout", "unsloth_fused_expert_lora",
})  # fmt: skip
"""Keys that tools add beside PEFT's and that say nothing about weights, or what `expert_order` reads."""

_HEADS: Mapping[str, str] = {
    "SEQ_CLS": "a classifier of texts, with a head (score, classifier) in the place of lm_head",
    "TOKEN_CLS": "a classifier of tokens, with a head (classifier, score) in the place of lm_head",
    "QUESTION_ANS": "a model that marks the answer in a text, with a head (qa_outputs) in the place of lm_head",
}
"""task_type of a model that writes no text -> what it is."""
_HEAD_MODULES = frozenset({
    "score", "classifier", "classification_head", "qa_outputs", "v_head", "value_head", "reward_head",
    "regression_head",
})  # fmt: skip


def refuse(config: AdapterConfig) -> list[str]:
    """Raise InputError for a peft type, a task or a setting that has no exact merge here.

    Returns what is to be said about the rest.
    """
    peft_type = config.get("peft_type")
    kind = KINDS.get(peft_type) if isinstance(peft_type, str) else None
    if kind is None:
        why = REASONS.get(str(peft_type), "is unknown here")
        raise config.error(f"peft_type is {setting_types.shown(peft_type)}, which {why}. Merged are {', '.join(KINDS)}")
    setting_types.check(config)
    task = str(config.get("task_type") or "").rpartition(".")[2].upper()  # older tools wrote TaskType.CAUSAL_LM
    if task in _HEADS:
        raise config.error(
            f"task_type is {task!r}: {_HEADS[task]}. requant makes language models that write text, the head would be "
            "lost. If lm_head was trained after all, write CAUSAL_LM there"
        )
    reason = kind.why_not_merged(config)
    if reason:
        raise config.error(reason)
    understood = COMMON | kind.settings | NO_MEANING
    unknown = sorted(key for key, value in config.items() if value and key not in understood)
    if unknown:
        raise config.error(
            f"unknown settings {', '.join(unknown)} (peft_version {config.get('peft_version')}): "
            "a newer PEFT may mean something by them that merging would lose"
        )
    if task not in ("", "CAUSAL_LM"):
        return [f"the adapter's task_type is {task}: it is merged and judged as a language model that writes text"]
    return []


def is_head(module: str) -> bool:
    """Whether a module is the head of a classifier, a reward or a value model."""
    return module.rpartition(".")[2] in _HEAD_MODULES or bool(_HEAD_MODULES & set(module.split(".")[:2]))
