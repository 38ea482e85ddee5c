"""Which modules of a model an adapter's settings target: PEFT's rules of matching names.

Reference: `check_target_module_exists` of PEFT 0.21, which a test compares with.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

ALL_LINEAR = "all-linear"


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether the settings target the module of this name.

    `target_modules` may not be "all-linear" here: that depends on the kinds of modules (`every_linear`).
    """
    if _matches(config.get("exclude_modules"), module):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in config.get("modules_to_save") or ()):
        return False
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return _matches(targets, module) and _in_layers(config, module)


def every_linear(config: Mapping[str, Any]) -> bool:
    """Whether all linear modules but the output embedding are targeted ("all-linear")."""
    targets = config.get("target_modules")
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def targeted_parameters(config: Mapping[str, Any], parameters: Iterable[str]) -> list[str]:
    """The parameters that `target_parameters` names: by the whole name, or its end."""
    names = config.get("target_parameters") or ()
    return [p for p in parameters if any(p == n or p.endswith(f".{n}") for n in names)]


def _matches(names: str | list[str] | None, module: str) -> bool:
    """A text is a regular expression of the whole name; an entry of a list is the name or its end."""
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return module in names or any(module.endswith(f".{name}") for name in names)


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    """`layers_to_transform` and `layers_pattern`, which count only where `target_modules` is a list."""
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or ()
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    rules = [rf"(?:^|.*?\.){p}\.(?P<index>\d+)\." for p in patterns] or [r".*?\.[^.]*\.(?P<index>\d+)\."]
    found = next((m for m in (re.match(rule, module) for rule in rules) if m), None)
    if found is None:
        return False
    index = int(found["index"])
    return index == layers if isinstance(layers, int) else index in layers
