"""Configs of single layers, where those differ: Gemma 4 has heads of two widths.

transformers refuses to read such a number from the config of the whole.
"""

from __future__ import annotations

import re
from typing import Any

_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


def layer_configs(config: Any) -> list[Any]:
    """The text config of every layer where they differ, else the one of all."""
    text = config.get_text_config()
    return list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text]


def layer_config(config: Any, module: str) -> Any:
    """The text config of the layer that a module belongs to; of a module outside, the first layer's."""
    text, found = config.get_text_config(), _LAYER.search(f".{module}.")
    if not getattr(text, "is_heterogeneous", False):
        return text
    layer = int(found[1]) if found else 0
    return text.per_layer_config[min(layer, len(text.per_layer_config) - 1)]
