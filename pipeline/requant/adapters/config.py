"""adapter_config.json as a mapping, with the rank and scaling of each module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.errors import InputError

CONFIG = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Mapping[str, Any]):
    """The settings of one adapter, and its weight in a combination of several.

    file: adapter_config.json, named in messages. weight: multiplies the scaling of every module.
    """

    file: Path
    settings: Mapping[str, Any]
    weight: float = 1.0

    def __getitem__(self, key: str) -> Any:
        return self.settings[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.settings)

    def __len__(self) -> int:
        return len(self.settings)

    def error(self, message: str) -> InputError:
        """An InputError that names the file."""
        return InputError(f"{self.file}: {message}")

    def rank(self, name: str) -> int:
        """The rank of a module or parameter: `rank_pattern`, or else `r`."""
        rank = pattern_value(self.get("rank_pattern") or {}, name, self.get("r"))
        if not isinstance(rank, int) or rank < 1:
            raise self.error(f"the rank of {name} is {rank!r}, expected a whole number above 0")
        return rank

    def alpha(self, name: str, key: str = "alpha") -> float:
        """Alpha of a module or parameter: `alpha_pattern`, or else the setting `key`."""
        alpha = pattern_value(self.get("alpha_pattern") or {}, name, self.get(key))
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise self.error(f"{key} is {alpha!r}, expected a number")
        return alpha

    def scaling(self, name: str) -> float:
        """alpha / r of a module or parameter, times the adapter's weight."""
        rank, alpha = self.rank(name), self.alpha(name)
        return self.weight * (alpha / rank)


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name (PEFT's rule)."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
