"""Values of overrides that a Python caller gives: plain data, as YAML would give it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


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
