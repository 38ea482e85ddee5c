"""The weights of an adapter directory: one safetensors file, or shards with an index."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from requant.checkpoint.reader import TensorInfo, read_header, read_weight_map
from requant.errors import InputError

WEIGHTS = "adapter_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARDS = "adapter_model-*-of-*.safetensors"


def read(path: Path) -> tuple[Path, dict[str, TensorInfo]]:
    """(file to name in messages, its tensors by key) of an adapter directory, from headers.

    Raises InputError when there are none, a shard is missing, or tensors have no elements.
    """
    file = path / WEIGHTS
    if not file.exists() and (path / INDEX).exists():
        file = path / INDEX
        tensors = _sharded(file)
    else:
        if not file.exists():
            raise InputError(_why_missing(path))
        tensors = read_header(file)
    if not tensors:
        raise InputError(f"{file}: holds no tensors")
    _refuse_empty(file, tensors)
    whole = next((name for name, info in tensors.items() if not info.dtype.is_floating_point), None)
    if whole is not None:
        raise InputError(
            f"{file}: {whole!r} is {str(tensors[whole].dtype).removeprefix('torch.')}, expected floating point: saved "
            "quantized? Save the adapter again in 16 or 32 bit"
        )
    return file, tensors


def _sharded(index: Path) -> dict[str, TensorInfo]:
    """The tensors of all shards, checked against the index in both directions."""
    weight_map = read_weight_map(index)
    named = set(weight_map.values())
    lost = sorted(f for f in named if not (index.parent / f).is_file())
    if lost:
        raise InputError(f"{index}: {len(lost)} of {len(named)} shards are missing: {', '.join(lost)}: copy them too")
    unnamed = sorted(f.name for f in index.parent.glob(SHARDS) if f.name not in named)
    if unnamed:
        raise InputError(f"{index}: does not name {', '.join(unnamed)}, which is there: save the adapter again")
    shards = {file: read_header(index.parent / file) for file in sorted(named)}
    absent = [name for name, file in weight_map.items() if name not in shards[file]]
    if absent:
        raise InputError(f"{index}: {len(absent)} tensors are not in the shards that it names, e.g. {absent[0]!r}")
    extra = [(name, file) for file, held in shards.items() for name in held if weight_map.get(name) != file]
    if extra:
        name, file = extra[0]
        raise InputError(f"{index}: does not name {len(extra)} tensors of the shards, e.g. {name!r} of {file}")
    return {name: shards[file][name] for name, file in weight_map.items()}


def _refuse_empty(file: Path, tensors: Mapping[str, TensorInfo]) -> None:
    empty = [name for name, info in tensors.items() if 0 in info.shape]
    if empty:
        raise InputError(
            f"{file}: {len(empty)} of {len(tensors)} tensors have no elements, e.g. {empty[0]!r}: saved under "
            "DeepSpeed ZeRO-3 without gathering the weights. Get them with zero_to_fp32.py from the checkpoint's "
            "global_step directory, or train with stage3_gather_16bit_weights_on_model_save: true and save again"
        )


def _why_missing(path: Path) -> str:
    """What to do in a directory that has adapter_config.json and no weights that are read."""
    pickles = sorted(f.name for f in path.glob("adapter_model*.bin"))
    if pickles:
        return (
            f"{path}: only {pickles[0]}, a pickle; requant never loads pickles. "
            "Save it again with safe_serialization=True"
        )
    shards = sorted(f.name for f in path.glob(SHARDS))
    if shards:
        return f"{path / INDEX}: missing, but {shards[0]} is there: copy the index too"
    found = sorted(f.name for f in path.iterdir() if f.name != "adapter_config.json")
    held = f"; beside adapter_config.json there are {', '.join(found[:5])}" if found else ""
    return f"{path / WEIGHTS}: missing; the adapter is incomplete: copy or download it again{held}"
