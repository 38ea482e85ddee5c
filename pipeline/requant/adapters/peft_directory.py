"""A PEFT adapter directory: what it contains, whether it can be merged exactly, one fold per module.

Nothing is read but headers until a fold is asked for. Whatever cannot be merged exactly is refused here, with the
reason, before anything is written. Semantics: PEFT 0.21 (tuners/lora). Formulas: `adapter_formulas`, `adapter_kinds`;
keys: `adapter_keys`; what is refused: `adapter_refusals`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from requant.adapters import kinds
from requant.adapters.fold import Fold
from requant.adapters.keys import PREFIX, Key, normalise_all
from requant.adapters.lora import Lora
from requant.adapters.trained_tokens import Rows
from requant.adapters.unsupported import refuse
from requant.checkpoint.reader import TensorInfo, read_header, read_json, read_tensor
from requant.errors import InputError

__all__ = ["PREFIX", "WEIGHTS", "Adapter", "ExpertPair", "Fold", "Lora", "load", "pattern_value"]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class ExpertPair:
    """LoRA on one stacked parameter of `module`; which parameter it is, only the base's shapes can tell (`experts`)."""

    module: str
    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True)
class Adapter:
    """A validated adapter: folds by module name, replacements by tensor name (both as the transformers model names them).

    weight: what its deltas are multiplied by, in a combination of several. copies: tensors that only repeat the base.
    """

    path: Path
    config: Mapping[str, Any]
    folds: Mapping[str, Fold]
    replaced: Mapping[str, TensorInfo]
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    keys: Mapping[str, Key | None] = field(repr=False)
    experts: tuple[ExpertPair, ...] = ()
    shared: Mapping[str, TensorInfo] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def base_name(self) -> str | None:
        """`base_model_name_or_path` of adapter_config.json."""
        name = self.config.get("base_model_name_or_path")
        return str(name) if name else None

    @property
    def ties_weights(self) -> bool:
        return bool(self.config.get("ensure_weight_tying"))

    @property
    def copies(self) -> int:
        """How many tensors only repeat the base's own values."""
        return sum(key is None for key in self.keys.values())

    def scaling(self, name: str) -> float:
        """alpha / r of a module or parameter, or alpha / sqrt(r) with rsLoRA, times the adapter's weight."""
        rank, alpha = self.rank(name), pattern_value(self.config.get("alpha_pattern") or {}, name, self._alpha)
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise InputError(f"{self.path / CONFIG}: {self._alpha_key} is {alpha!r}, expected a number")
        return self.weight * (alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank)

    def rank(self, name: str) -> int:
        """The rank that the config gives to a module or parameter."""
        rank = pattern_value(self.config.get("rank_pattern") or {}, name, self.config.get("r"))
        if not isinstance(rank, int) or rank < 1:
            raise InputError(f"{self.path / CONFIG}: the rank of {name} is {rank!r}, expected a whole number above 0")
        return rank

    @property
    def _alpha_key(self) -> str:
        return "lora_alpha" if self.config.get("peft_type") == "LORA" else "alpha"

    @property
    def _alpha(self) -> Any:
        return self.config.get(self._alpha_key)


def load(path: Path, *, weight: float = 1.0) -> Adapter:
    """Read a PEFT directory's headers; raises InputError for anything that cannot be merged exactly.

    weight: multiplies the deltas; other than 1 only for LoRA without DoRA and without tensors that replace the base's.
    """
    config_file = path / CONFIG
    if not path.is_dir():
        raise InputError(f"{path}: no such adapter directory")
    if not config_file.exists():
        raise InputError(f"{path}: no adapter_config.json; expected a directory written by PEFT's save_pretrained")
    config = read_json(config_file)
    refuse(config, config_file)
    weights = path / WEIGHTS
    if not weights.exists() and (path / "adapter_model.bin").exists():
        raise InputError(
            f"{path}: only adapter_model.bin, a pickle; requant never loads pickles. "
            "Save it again with safe_serialization=True"
        )
    tensors = read_header(weights)
    if not tensors:
        raise InputError(f"{weights}: holds no tensors")
    try:
        keys = normalise_all(tensors, lambda a, b: _equal(tensors[a], tensors[b]))
    except InputError as error:
        raise InputError(f"{weights}: {error}") from error
    return _assemble(Adapter(path, config, {}, {}, tensors, keys, weight=weight))


def _equal(a: TensorInfo, b: TensorInfo) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(read_tensor(a), read_tensor(b))


def _assemble(empty: Adapter) -> Adapter:
    """Sort every tensor of the file into folds and replacements; nothing may be left over."""
    parts: dict[tuple[str, int], dict[str, TensorInfo]] = {}
    replaced: dict[str, TensorInfo] = {}
    for spelled, key in empty.keys.items():
        if key is not None and key.part is None:
            replaced[key.replaces] = empty.tensors[spelled]
        elif key is not None and key.part is not None:
            parts.setdefault((key.module, key.wrapped), {})[key.part] = empty.tensors[spelled]
    shared = parts.pop(("", 0), {})
    folds: dict[str, Fold] = {}
    experts: list[ExpertPair] = []
    for (module, wrapped), found in parts.items():
        if empty.config.get("target_parameters") and (wrapped or _stacked(empty, module, found)):
            experts.append(_pair(empty, module, found))
        elif wrapped:
            raise InputError(f"{empty.path / WEIGHTS}: {module} is wrapped twice, but target_parameters is not set")
        else:
            folds[module] = _fold(empty, module, found, shared)
    if not folds and not replaced and not experts:
        sample = next(iter(empty.tensors))
        raise InputError(f"{empty.path / WEIGHTS}: no LoRA tensors found among {len(empty.tensors)}, e.g. {sample!r}")
    return replace(empty, folds=folds, replaced=replaced, experts=tuple(experts), shared=shared)


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rank_pattern / alpha_pattern lookup: the first pattern that matches the end of the module's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _stacked(adapter: Adapter, module: str, found: Mapping[str, TensorInfo]) -> bool:
    """Whether a module's LoRA is on a stacked parameter: its tensors hold several ranks, one an expert."""
    names = [str(p).rpartition(".") for p in adapter.config["target_parameters"]]
    owned = any(module == owner or module.endswith("." + owner) for owner, _, leaf in names if leaf != "weight")
    a = found.get("lora_A")
    return owned or (a is not None and len(a.shape) == 2 and a.shape[0] > adapter.rank(module))


def _pair(adapter: Adapter, module: str, found: Mapping[str, TensorInfo]) -> ExpertPair:
    file = adapter.path / WEIGHTS
    a, b = found.get("lora_A"), found.get("lora_B")
    if a is None or b is None or len(found) > 2:
        raise InputError(f"{file}: {module} has {', '.join(sorted(found))}; expected lora_A and lora_B alone")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise InputError(f"{file}: {module}: lora_A {a.shape} and lora_B {b.shape} do not multiply")
    return ExpertPair(module, a, b)


def _fold(adapter: Adapter, module: str, found: Mapping[str, TensorInfo], shared: Mapping[str, TensorInfo]) -> Fold:
    """Check one module's tensors against each other and the config."""
    file, kind = adapter.path / WEIGHTS, str(adapter.config["peft_type"])
    if "trainable_tokens_delta" in found:
        return _rows(adapter, module, found)
    if kind == "LORA":
        return _lora(adapter, module, found)
    if kind == "TRAINABLE_TOKENS":
        raise InputError(f"{file}: {module} has {', '.join(sorted(found))}, expected trainable_tokens_delta alone")
    scaling = adapter.scaling(module) if kind in ("LOHA", "LOKR") else 1.0
    try:
        return kinds.build(kind, adapter.config, module, found, shared, scaling)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _rows(adapter: Adapter, module: str, found: Mapping[str, TensorInfo]) -> Fold:
    """Trained tokens of one embedding: their rows, and which they are by the config."""
    file = adapter.path / CONFIG
    if len(found) > 1:
        raise InputError(f"{adapter.path / WEIGHTS}: {module} has trained tokens and {', '.join(sorted(found))}")
    key = "token_indices" if adapter.config["peft_type"] == "TRAINABLE_TOKENS" else "trainable_token_indices"
    given, rows = adapter.config.get(key), found["trainable_tokens_delta"]
    if isinstance(given, Mapping):
        given = next((v for name, v in given.items() if module == name or module.endswith(f".{name}")), None)
    if not isinstance(given, list) or not all(isinstance(i, int) and i >= 0 for i in given):
        raise InputError(f"{file}: {key} has no list of token ids for {module}, whose trained rows are in {WEIGHTS}")
    if len(rows.shape) != 2 or len(given) != rows.shape[0] or len(set(given)) != len(given):
        raise InputError(f"{file}: {key} lists {len(given)} tokens for {module}, {WEIGHTS} has rows {rows.shape}")
    return Rows(module, tuple(given), rows)


def _lora(adapter: Adapter, module: str, found: Mapping[str, TensorInfo]) -> Lora:
    file, config = adapter.path / WEIGHTS, adapter.config
    embedding = "lora_embedding_A" in found
    a, b = (found.get(f"lora_embedding_{x}" if embedding else f"lora_{x}") for x in "AB")
    if a is None or b is None:
        raise InputError(f"{file}: {module} has {', '.join(sorted(found))} but not both lora_A and lora_B")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise InputError(
            f"{file}: {module}: lora_A {a.shape} and lora_B {b.shape} do not multiply (linear layers only)"
        )
    if adapter.rank(module) != a.shape[0]:
        raise InputError(
            f"{adapter.path / CONFIG}: rank of {module} is {adapter.rank(module)} there, {a.shape[0]} in {WEIGHTS}"
        )
    magnitude = found.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise InputError(f"{file}: use_dora is {config.get('use_dora')} but {module} has {sorted(found)}")
    if magnitude is not None and magnitude.nbytes != b.shape[0] * magnitude.dtype.itemsize:
        raise InputError(f"{file}: {module}: magnitude has shape {magnitude.shape}, lora_B has {b.shape[0]} rows")
    if magnitude is not None and embedding:
        raise InputError(f"{file}: {module}: DoRA on an embedding is not merged yet")
    return Lora(module, a, b, adapter.scaling(module), magnitude, found.get("lora_B.bias"), embedding)
