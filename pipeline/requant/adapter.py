"""A PEFT adapter directory: what it contains, whether it can be merged exactly, one fold per module.

Nothing is read but headers until a fold is asked for. Whatever cannot be merged exactly is refused here, with the
reason, before anything is written. Semantics: PEFT 0.21 (tuners/lora); the paper for DoRA is arXiv:2402.09353,
for rsLoRA arXiv:2312.03732.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from requant.checkpoint import TensorInfo, read_header, read_json, read_tensor
from requant.errors import InputError

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"

_RESIDUAL_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")
_REFUSED = {
    "layer_replication": "its layers are copies that do not exist in the base checkpoint",
    "trainable_token_indices": "trainable tokens are not merged yet",
    "target_parameters": "LoRA on raw (expert) parameters is not merged yet",
    "alora_invocation_tokens": "an activated LoRA acts on some tokens only and has no merged form",
    "arrow_config": "Arrow routing depends on the input and has no merged form",
    "use_qalora": "QA-LoRA pools its input; merging it needs the group-wise zero points it was trained with",
    "use_bdlora": "block-diagonal LoRA is not merged yet",
    "kasa_config": "KaSA adapters change the base by its singular values; they are not merged yet",
    "velora_config": "VeLoRA adapters are not merged yet",
    "monteclora_config": "MonteCLoRA samples its weights and has no single merged form",
}
_KNOWN = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
    "bias", "use_rslora", "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "use_dora", "qalora_group_size", "runtime_config", "lora_bias",
    "ensure_weight_tying",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fold:
    """How one module's weight changes: W = D + scaling * B @ A, then DoRA's rows rescaled to `magnitude`.

    `a` is [r, in] and `b` [out, r] for linear modules; for an embedding `a` is [r, vocabulary] and `b` [width, r].
    """

    module: str
    a: TensorInfo
    b: TensorInfo
    scaling: float
    magnitude: TensorInfo | None = None
    bias: TensorInfo | None = None
    embedding: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight it folds into ([vocabulary, width] for an embedding)."""
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (columns, rows) if self.embedding else (rows, columns)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return tuple(t for t in (self.a, self.b, self.magnitude, self.bias) if t is not None)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(left [rows, r], right [r, columns]) in fp32: the delta is `scaling * left @ right`."""
        a, b = read_tensor(self.a).float(), read_tensor(self.b).float()
        return (a.T.contiguous(), b.T.contiguous()) if self.embedding else (b, a)

    def apply(self, weight: Tensor) -> bool:
        """Fold into `weight` (fp32 [rows, columns]) in place; returns whether the adapter says to change anything."""
        left, right = self.factors()
        weight.addmm_(left, right, alpha=self.scaling)
        if self.magnitude is None:
            return bool(left.any()) and bool(right.any())
        magnitude = read_tensor(self.magnitude).float().reshape(-1, 1)
        weight.mul_(magnitude / torch.linalg.vector_norm(weight, dim=1, keepdim=True))
        return True

    def bound(self) -> float:
        """An upper bound of the largest magnitude that folding can add (LoRA) or leave (DoRA)."""
        if self.magnitude is not None:
            return float(read_tensor(self.magnitude).float().abs().max())
        left, right = self.factors()
        norms = torch.linalg.vector_norm(left, dim=1).max() * torch.linalg.vector_norm(right, dim=0).max()
        return abs(self.scaling) * float(norms)


@dataclass(frozen=True)
class Adapter:
    """A validated adapter: folds by module name, replacements by tensor name (both as the transformers model names them)."""

    path: Path
    config: Mapping[str, Any]
    folds: Mapping[str, Fold]
    replaced: Mapping[str, TensorInfo]
    tensors: Mapping[str, TensorInfo] = field(repr=False)

    @property
    def base_name(self) -> str | None:
        """`base_model_name_or_path` of adapter_config.json."""
        name = self.config.get("base_model_name_or_path")
        return str(name) if name else None

    @property
    def ties_weights(self) -> bool:
        return bool(self.config.get("ensure_weight_tying"))


def load(path: Path) -> Adapter:
    """Read a PEFT directory's headers; raises InputError for anything that cannot be merged exactly."""
    config_file = path / "adapter_config.json"
    if not path.is_dir():
        raise InputError(f"{path}: no such adapter directory")
    if not config_file.exists():
        raise InputError(f"{path}: no adapter_config.json; expected a directory written by PEFT's save_pretrained")
    config = read_json(config_file)
    _refuse(config, config_file)
    weights = path / WEIGHTS
    if not weights.exists() and (path / "adapter_model.bin").exists():
        raise InputError(
            f"{path}: only adapter_model.bin, a pickle; requant never loads pickles. "
            "Save it again with safe_serialization=True"
        )
    tensors = read_header(weights)
    if not tensors:
        raise InputError(f"{weights}: holds no tensors")
    return _assemble(path, config, tensors)


def _refuse(config: Mapping[str, Any], file: Path) -> None:
    """Raise InputError for every kind of adapter whose exact merge is not known here."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{file}: peft_type is {kind!r}; only LORA adapters (LoRA, rsLoRA, DoRA) are merged")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_RESIDUAL_INITS):
        raise InputError(
            f"{file}: init_lora_weights is {init!r}: this adapter belongs to a residual base, not to the base it names. "
            "Convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...) and use the result"
        )
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise InputError(f"{file}: {key} is set: {reason}")
    unknown = sorted(k for k, v in config.items() if v and k not in _KNOWN and k not in _REFUSED)
    if unknown:
        raise InputError(
            f"{file}: unknown settings {', '.join(unknown)} (peft_version {config.get('peft_version')}): "
            "a newer PEFT may mean something by them that merging would lose"
        )


def _assemble(path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Adapter:
    """Sort every tensor of the file into folds and replacements; nothing may be left over."""
    parts: dict[str, dict[str, TensorInfo]] = {}
    replaced: dict[str, TensorInfo] = {}
    for key, info in tensors.items():
        module, part = _split(key)
        if part:
            parts.setdefault(module, {})[part] = info
        else:
            replaced[module] = info
    folds = {module: _fold(path, config, module, found) for module, found in parts.items()}
    if not folds and not replaced:
        raise InputError(f"{path / WEIGHTS}: no LoRA tensors found among {len(tensors)}, e.g. {next(iter(tensors))!r}")
    return Adapter(path, config, folds, replaced, tensors)


_PART = re.compile(
    r"^(.*)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.default)?(?:\.(weight|bias))?$"
)


def _split(key: str) -> tuple[str, str | None]:
    """Adapter key -> (module, part) of a LoRA tensor, or (tensor name, None) of a tensor that replaces the base's."""
    bare = key
    while bare.startswith(PREFIX):
        bare = bare.removeprefix(PREFIX)
    match = _PART.match(bare)
    if match:
        module, part, leaf = match.groups()
        return module.replace(".base_layer", ""), f"{part}.bias" if leaf == "bias" else part
    return bare.replace(".modules_to_save.default", "").replace(".modules_to_save", "").replace(".base_layer", ""), None


def pattern_value(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rank_pattern / alpha_pattern lookup: the first pattern that matches the end of the module's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _fold(path: Path, config: Mapping[str, Any], module: str, found: Mapping[str, TensorInfo]) -> Fold:
    """Check one module's tensors against each other and the config."""
    file = path / WEIGHTS
    embedding = "lora_embedding_A" in found
    a, b = (found.get(f"lora_embedding_{x}" if embedding else f"lora_{x}") for x in "AB")
    if a is None or b is None:
        raise InputError(f"{file}: {module} has {', '.join(sorted(found))} but not both lora_A and lora_B")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise InputError(
            f"{file}: {module}: lora_A {a.shape} and lora_B {b.shape} do not multiply (linear layers only)"
        )
    rank = a.shape[0]
    expected = pattern_value(config.get("rank_pattern") or {}, module, config.get("r"))
    if expected != rank:
        raise InputError(f"{path / 'adapter_config.json'}: rank of {module} is {expected} there, {rank} in {WEIGHTS}")
    alpha = pattern_value(config.get("alpha_pattern") or {}, module, config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise InputError(f"{path / 'adapter_config.json'}: lora_alpha is {alpha!r}, expected a number")
    magnitude = found.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise InputError(f"{file}: use_dora is {config.get('use_dora')} but {module} has {sorted(found)}")
    if magnitude is not None and magnitude.nbytes != b.shape[0] * magnitude.dtype.itemsize:
        raise InputError(f"{file}: {module}: magnitude has shape {magnitude.shape}, lora_B has {b.shape[0]} rows")
    if magnitude is not None and embedding:
        raise InputError(f"{file}: {module}: DoRA on an embedding is not merged yet")
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Fold(module, a, b, scaling, magnitude, found.get("lora_B.bias"), embedding)
