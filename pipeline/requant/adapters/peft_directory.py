"""A PEFT adapter directory: its config and tensors, every tensor assigned to a module.

Loading reads headers only. Whatever cannot be merged exactly is refused here, with the reason, before anything is
written. Semantics: PEFT 0.21 (tuners/lora).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from requant.adapters import other_files, setting_types, stacked_lora, weight_files
from requant.adapters.config import CONFIG, AdapterConfig
from requant.adapters.fold import Fold
from requant.adapters.keys import Key, normalise_all
from requant.adapters.kinds import KINDS
from requant.adapters.module_tensors import ModuleTensors
from requant.adapters.stacked_lora import AskedOrder, ExpertPair
from requant.adapters.unsupported import is_head, refuse
from requant.adapters.weight_files import WEIGHTS
from requant.checkpoint.reader import TensorInfo, read_json, read_tensor
from requant.errors import InputError

_TRIED = 100  # modules whose names regular expressions are tried on
__all__ = ["CONFIG", "WEIGHTS", "Adapter", "load", "named_apart"]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A validated adapter; modules and tensors are named as the transformers model names them.

    folds: module -> the change of its weight. expert_pairs: LoRA on stacked experts, not yet assigned to parameters.
    replaced: tensor of the base -> the tensor that replaces it. shared: tensors that belong to no module.
    tensors, keys: key in the file -> its header, and what the key means (None: a copy of the base's own tensor).
    weights: the file, or the index of several. notes: what in the directory is not used, for the reader.
    expert_order: in which lora_B of stacked experts is read (`expert_order`); auto: as recorded. order_reason: of a
    measured one, in words. name: for the reader, see `named_apart`.
    """

    path: Path
    weights: Path
    config: AdapterConfig
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    keys: Mapping[str, Key | None] = field(repr=False)
    folds: Mapping[str, Fold] = field(default_factory=dict)
    expert_pairs: tuple[ExpertPair, ...] = ()
    replaced: Mapping[str, TensorInfo] = field(default_factory=dict)
    shared: Mapping[str, TensorInfo] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    expert_order: AskedOrder = "auto"
    order_reason: str = ""
    name: str = ""

    @property
    def weight(self) -> float:
        """The factor of the deltas in a combination of several adapters."""
        return self.config.weight

    @property
    def base_name(self) -> str | None:
        """`base_model_name_or_path` of adapter_config.json."""
        name = self.config.get("base_model_name_or_path")
        return str(name) if name else None

    @property
    def ties_weights(self) -> bool:
        """Whether the adapter was trained with tied embeddings on purpose (`ensure_weight_tying`)."""
        return bool(self.config.get("ensure_weight_tying"))

    @property
    def copies(self) -> int:
        """How many tensors only repeat the base's own values."""
        return sum(key is None for key in self.keys.values())


def load(path: str | Path, *, weight: float = 1.0, expert_order: AskedOrder = "auto") -> Adapter:
    """Load a PEFT directory: its config and the headers of its tensors.

    Raises InputError for anything that cannot be merged exactly.
    weight: multiplies the deltas; other than 1 only for LoRA without DoRA and without tensors that replace the base's.
    expert_order: of lora_B of stacked experts; auto: as the adapter's files say.
    """
    path = Path(path)
    config_file = path / CONFIG
    if not path.is_dir():
        raise InputError(f"{path}: no such adapter directory")
    if not config_file.exists():
        raise InputError(f"{path}: no adapter_config.json; expected a directory written by PEFT's save_pretrained")
    config = AdapterConfig(file=config_file, settings=read_json(config_file), weight=weight)
    notes = refuse(config)
    weights, tensors = weight_files.read(path)
    try:
        keys = normalise_all(tensors, lambda a, b: _equal(tensors[a], tensors[b]))
    except InputError as error:
        raise InputError(f"{weights}: {error}") from error
    setting_types.check_expressions(config, [*{key.module: None for key in keys.values() if key is not None}][:_TRIED])
    empty = Adapter(path=path, weights=weights, config=config, tensors=tensors, keys=keys, name=path.name)
    loaded = _assemble(empty)
    return replace(loaded, notes=(*notes, *other_files.check(path, loaded.replaced)), expert_order=expert_order)


def named_apart(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters, each named by as many last parts of its path as tell all of them apart."""
    paths = {a.path for a in adapters}
    count = 1
    while len({a.path.parts[-count:] for a in adapters}) < len(paths):
        count += 1
    return [replace(a, name="/".join(a.path.parts[-count:])) for a in adapters]


def _equal(a: TensorInfo, b: TensorInfo) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(read_tensor(a), read_tensor(b))


def _assemble(empty: Adapter) -> Adapter:
    """The adapter with every tensor of its file as a fold, expert pair or replacement.

    No tensor may be left over. Raises InputError for a file without adapter tensors, and for a module that is wrapped
    twice without `target_parameters`.
    """
    file, config = empty.weights, empty.config
    by_module: dict[tuple[str, int], dict[str, TensorInfo]] = {}
    replaced: dict[str, TensorInfo] = {}
    for spelled, key in empty.keys.items():
        if key is not None and key.tensor is None and is_head(key.module):
            raise InputError(
                f"{file}: {spelled!r} is the head of a classifier, a reward or a value model: requant makes language "
                "models that write text, the head would be lost. Leave it out if the text alone matters"
            )
        if key is not None and key.tensor is None:
            replaced[key.replaces] = empty.tensors[spelled]
        elif key is not None and key.tensor is not None:
            by_module.setdefault((key.module, key.wrapped), {})[key.tensor] = empty.tensors[spelled]
    shared = by_module.pop(("", 0), {})
    kind = KINDS[config["peft_type"]]
    folds: dict[str, Fold] = {}
    pairs: list[ExpertPair] = []
    for (module, wrapped), found in by_module.items():
        tensors = ModuleTensors(module=module, found=found, shared=shared, config=config, file=file)
        if config.get("target_parameters") and (wrapped or stacked_lora.is_stacked(tensors)):
            pairs.append(stacked_lora.pair(tensors))
        elif wrapped:
            raise InputError(f"{file}: {module} is wrapped twice, but target_parameters is not set")
        else:
            folds[module] = kind.build(tensors)
    if not folds and not replaced and not pairs:
        sample = next(iter(empty.tensors))
        raise InputError(f"{file}: no LoRA tensors found among {len(empty.tensors)}, e.g. {sample!r}")
    return replace(empty, folds=folds, replaced=replaced, expert_pairs=tuple(pairs), shared=shared)
