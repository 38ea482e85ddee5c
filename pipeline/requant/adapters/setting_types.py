"""Types of the settings in adapter_config.json: a wrong one is refused by its key.

Files are edited by hand and by tools; PEFT itself takes a text for a list of letters, and "false" for true.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from requant.adapters.config import AdapterConfig
from requant.runtime.guarded_process import matches_in_time

_BOOLEANS = (
    "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "inference_mode", "ensure_weight_tying", "save_projection",
    "block_share", "coft", "use_cayley_neumann", "use_effective_conv2d", "decompose_both",
)  # fmt: skip
_NUMBERS = ("lora_alpha", "alpha")
_TEXTS = ("base_model_name_or_path", "revision", "task_type", "peft_version", "bias")
_PATTERNS = ("target_modules", "exclude_modules", "feedforward_modules")
_NAMES = ("modules_to_save", "target_parameters")
_RANKS = ("r", "oft_block_size", "num_cayley_neumann_terms")

_LARGEST = 1e9  # of alpha: beyond it the product overflows fp32


def check(config: AdapterConfig) -> None:
    """Raise InputError for a setting of the wrong type; one that is null or missing is not set."""
    for keys, expected, fits in _RULES:
        for key in keys:
            value = config.get(key)
            if value is not None and not fits(value):
                raise config.error(f"{key} is {shown(value)}, expected {expected}")
    if config.get("r") == 0 and config.get("peft_type") != "OFT":  # there the block size decides
        raise config.error("r is 0, expected a whole number above 0")
    for key in _NUMBERS:
        if config.get(key) == 0 and not config.get("alpha_pattern"):
            raise config.error(f"{key} is 0: the adapter would change nothing")
    for key, whole in (("rank_pattern", True), ("alpha_pattern", False)):
        _check_patterns(config, key, whole=whole)
    for key in ("token_indices", "trainable_token_indices"):
        value = config.get(key)
        lists = list(value.values()) if isinstance(value, Mapping) else [value]
        if value is not None and not all(isinstance(ids, list) and all(map(_whole, ids)) for ids in lists):
            raise config.error(f"{key} is {shown(value)}, expected a list of token ids, or a list for each module")


def check_expressions(config: AdapterConfig, modules: Collection[str]) -> None:
    """Raise InputError for a regular expression that takes too long on the names of the adapter's modules."""
    for key in ("rank_pattern", "alpha_pattern", *_PATTERNS, "modules_to_save", "layers_pattern"):
        value = config.get(key) or ()
        for pattern in (value,) if isinstance(value, str) else value:
            if not matches_in_time(pattern, modules):
                raise config.error(
                    f"{key} has {shown(pattern)}, which takes too long on a module's name: write it without a "
                    "repetition inside a repetition"
                )


def shown(value: Any) -> str:
    """A value in a message, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."


def _check_patterns(config: AdapterConfig, key: str, *, whole: bool) -> None:
    """rank_pattern and alpha_pattern: regular expressions of module names -> numbers."""
    patterns = config.get(key)
    if not patterns:
        return
    number = "whole number" if whole else "number"
    if not isinstance(patterns, Mapping):
        raise config.error(f"{key} is {shown(patterns)}, expected pairs of module pattern and {number}")
    for pattern, value in patterns.items():
        if not _expression(pattern):
            raise config.error(f"{key} has {pattern!r}, which is no regular expression")
        if not (_whole(value) if whole else _number(value)):
            raise config.error(f"{key} of {pattern!r} is {shown(value)}, expected a {number}")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _number(value: Any) -> bool:
    try:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return number and abs(value) <= _LARGEST
    except OverflowError:
        return False


def _expression(value: Any) -> bool:
    try:
        re.compile(rf"(.*\.)?({value})$")
    except (re.error, RecursionError, OverflowError):
        return False
    return isinstance(value, str)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and v for v in value)


def _saved(value: Any) -> bool:
    return _names(value) and all(map(_expression, value))


def _layers(value: Any) -> bool:
    return _whole(value) or (isinstance(value, list) and all(map(_whole, value)))


_RULES: tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...] = (
    (_BOOLEANS, "true or false", lambda v: isinstance(v, bool)),
    (_NUMBERS, "a number", _number),
    (_RANKS, "a whole number above 0", _whole),
    (_TEXTS, "text", lambda v: isinstance(v, str)),
    (_PATTERNS, "a list of module names or a regular expression", lambda v: _names(v) or _expression(v)),
    (("modules_to_save",), "a list of module names", _saved),
    (_NAMES, "a list of names", _names),
    (("layers_to_transform",), "a list of layer numbers", _layers),
    (("layers_pattern",), "a name or a list of names", lambda v: _saved(v) or _expression(v)),
)
"""(keys, what is expected, whether a value is that)."""
