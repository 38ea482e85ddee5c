"""Overrides: keys and values as `--set` spells them, plain data of a Python caller."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from requant.errors import RecipeError

_STEP = r'(?:"[^"]+"|[^".=\s]+)'
_SET = re.compile(rf"({_STEP}(?:\.{_STEP})*)=(.*)", re.DOTALL)


def split_setting(setting: str) -> tuple[str, str]:
    """(key, text of the value) of a `--set`; raises RecipeError for what is none."""
    match = _SET.fullmatch(setting)
    if match is None:
        raise RecipeError(f"--set {setting}: expected key.path=value, such as --set quantize.bits=3")
    return match[1], match[2]


def is_key(text: str) -> bool:
    """Whether a text is a key path."""
    return re.fullmatch(rf"{_STEP}(?:\.{_STEP})*", text) is not None


def steps_of(key: str) -> list[str]:
    """The steps of a key path in text; one that contains a dot is in double quotes."""
    return [quoted or plain for quoted, plain in re.findall(r'"([^"]+)"|([^".]+)', key)]


def plain_data(value: Any) -> Any:
    """Python data as YAML would give it: tuples as lists, paths as text that is no hub id (./name)."""
    if isinstance(value, Mapping):
        return {str(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item) for item in value]
    if not isinstance(value, os.PathLike):
        return value
    text = os.fspath(value)
    return text if text.startswith(("/", ".", "~")) else f"./{text}"
