"""The table of adapter kinds: peft_type -> how its tensors and settings are read.

A kind is one file of this package and one line in `KINDS`. Everything else is derived from the table: which keys of the
weights file belong to the adapter, which settings are understood, what is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from requant.adapters import ia3, loha, lokr, lora, oft, trained_tokens, vera
from requant.adapters.fold import Fold
from requant.adapters.module_tensors import ModuleTensors, TensorKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How the adapters of one peft_type are read.

    build: the fold of one module; raises InputError when its tensors do not fit together or to the config.
    tensors: name of each tensor that PEFT saves for the kind -> how its key is spelled.
    settings: keys of adapter_config.json that it adds to the common ones (`unsupported.COMMON`); others are refused.
    why_not_merged: of the config, a setting that has no exact merge and its reason.
    """

    build: Callable[[ModuleTensors], Fold]
    tensors: Mapping[str, TensorKey]
    settings: frozenset[str]
    why_not_merged: Callable[[Mapping[str, Any]], str | None] = lambda config: None


KINDS: dict[str, Kind] = {
    "LORA": Kind(build=lora.build, tensors=lora.TENSORS, settings=lora.SETTINGS, why_not_merged=lora.why_not_merged),
    "LOHA": Kind(build=loha.build, tensors=loha.TENSORS, settings=loha.SETTINGS),
    "LOKR": Kind(build=lokr.build, tensors=lokr.TENSORS, settings=lokr.SETTINGS),
    "VERA": Kind(build=vera.build, tensors=vera.TENSORS, settings=vera.SETTINGS),
    "IA3": Kind(build=ia3.build, tensors=ia3.TENSORS, settings=ia3.SETTINGS),
    "OFT": Kind(build=oft.build, tensors=oft.TENSORS, settings=oft.SETTINGS, why_not_merged=oft.why_not_merged),
    "TRAINABLE_TOKENS": Kind(
        build=trained_tokens.build, tensors=trained_tokens.TENSORS, settings=trained_tokens.SETTINGS
    ),
}


def tensor_keys() -> dict[str, TensorKey]:
    """Name of every tensor that an adapter of any kind may have -> how its key is spelled."""
    return {name: key for kind in KINDS.values() for name, key in kind.tensors.items()}
