"""A directory of safetensors, read tensor by tensor. Writing is `writer`.

Opening reads the headers only; `read` then reads exactly the bytes of one tensor (no mmap: the resident set stays one
tensor). What a header must be like: `safetensors_header`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

import torch

from requant.checkpoint.safetensors_header import DTYPE_NAMES, DTYPES, TensorInfo, read_header
from requant.errors import InputError, StageError
from requant.runtime.pinned_memory import allocate
from requant_eval import strict_json
from requant_eval.regular_files import open_regular

__all__ = [
    "DTYPES",
    "DTYPE_NAMES",
    "FOLDERS",
    "INDEX",
    "SINGLE",
    "TEMPLATES",
    "Checkpoint",
    "TensorInfo",
    "Weights",
    "cut",
    "entries_of",
    "file_digest",
    "opened",
    "quantization_in",
    "read_header",
    "read_json",
    "read_part",
    "read_tensor",
    "read_weight_map",
    "refuse_unreadable",
    "stored_names",
]  # fmt: skip

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TEMPLATES = "additional_chat_templates"  # a folder: one file a named template
FOLDERS = (TEMPLATES, "custom_generate")  # whose files belong to a model
PART = 2**25  # bytes of a tensor that a thread reads at a time
READERS = min(8, os.cpu_count() or 1)


class Weights(Protocol):
    """Tensors by their names in a 16-bit checkpoint.

    A `Checkpoint`, or what is computed from one as it is read.
    """

    @property
    def path(self) -> Path:
        """The directory that is read, for messages."""

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def read(self, name: str) -> torch.Tensor:
        """One tensor, its Conv1D weights as a 16-bit checkpoint holds them, on any device."""


QUANTIZE_CONFIG = "quantize_config.json"  # its first releases wrote neither the method nor that all is symmetric


class Checkpoint(Mapping[str, TensorInfo]):
    """A directory of safetensors: name -> TensorInfo of every tensor.

    `read` gives the values, `config` is config.json.
    Raises InputError when there are no safetensors (pickles are never loaded), a shard is missing or cut, or
    the index names a tensor that its shard does not hold.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        if not path.is_dir():
            raise InputError(f"{path}: no such model directory: name one that holds config.json and safetensors")
        refuse_unreadable(path)
        self._infos = _tables(path)

    def __getitem__(self, name: str) -> TensorInfo:
        try:
            return self._infos[name]
        except KeyError:
            raise KeyError(f"{self.path}: no tensor {name!r}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def config(self) -> dict[str, Any]:
        """config.json as raw JSON."""
        return read_json(self.path / "config.json", constants=True)

    @property
    def quantization(self) -> dict[str, Any]:
        """`quantization_in` config.json; of GPTQ tensors without one, the quantize_config.json that AutoGPTQ wrote."""
        found = quantization_in(self.config, self.path / "config.json")
        if found or self.quantization_place != QUANTIZE_CONFIG:
            return found
        return {"quant_method": "gptq", "sym": True} | read_json(self.path / QUANTIZE_CONFIG)

    @property
    def quantization_place(self) -> str:
        """Where `quantization` stands: file, and key where it has one."""
        beside = (self.path / QUANTIZE_CONFIG).is_file() and any(name.endswith(".qweight") for name in self)
        inside = quantization_in(self.config, self.path / "config.json")
        return QUANTIZE_CONFIG if beside and not inside else "config.json: quantization_config"

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` on the CPU, in the dtype and shape of the file."""
        return read_tensor(self[name])

    def contiguous(self, name: str) -> bool:
        """Whether the tensor's bytes stand together in its file, as its `TensorInfo` says."""
        return name in self._infos


def entries_of(directory: Path) -> list[Path]:
    """What a model or adapter directory holds, and the folders that belong to a model, by name."""
    inside = (entry for folder in FOLDERS for entry in (directory / folder).glob("*"))
    return sorted([*directory.iterdir(), *inside])


def refuse_unreadable(directory: Path) -> None:
    """Raise InputError for an entry of a model directory that can be no file: a pipe, a device, a link to nowhere.

    A library that opens a pipe would wait; what a link to nowhere stood for would be missing without a word. Hidden
    entries are nobody's files: editors keep locks as such links.
    """
    try:
        for entry in entries_of(directory):
            if entry.is_symlink() and not entry.exists() and not entry.name.startswith("."):
                raise InputError(f"{entry}: a link that leads nowhere: download the file again, or remove the link")
            if entry.exists() and not entry.is_file() and not entry.is_dir():
                raise InputError(f"{entry}: a device or a pipe, expected files: remove it, or download the file again")
    except OSError as error:
        raise InputError(f"{error.filename or directory}: cannot be read ({error.strerror or error})") from error


def stored_names(path: Path) -> tuple[str, ...]:
    """Names of the tensors that a directory holds; none where it holds no safetensors."""
    return tuple(_tables(path)) if any(path.glob("*.safetensors")) else ()


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """Read one tensor; several threads read a large one.

    Raises StageError when the file changed or cannot be read.
    """
    flat = allocate(info.nbytes)
    parts = cut(info.nbytes, PART)
    with opened(info) as file:
        if len(parts) > 1:  # one thread would spend its time on the pages of new memory
            with ThreadPoolExecutor(min(len(parts), READERS)) as pool:
                list(pool.map(lambda part: read_part(file, info, part, flat[part]), parts))
        elif parts:
            read_part(file, info, parts[0], flat)
    return flat.view(info.dtype).reshape(info.shape)


def cut(nbytes: int, size: int) -> list[slice]:
    """`nbytes` bytes as parts of `size`, the last one shorter."""
    return [slice(start, min(start + size, nbytes)) for start in range(0, nbytes, size)]


@contextmanager
def opened(info: TensorInfo) -> Iterator[BufferedReader]:
    """A tensor's file, open while parts of it are read.

    An OSError inside the block becomes a StageError.
    """
    try:
        with open_regular(info.file) as file:
            yield file
    except OSError as error:
        raise StageError(f"{info.file}: {info.name!r} cannot be read ({error.strerror or error})") from error


def read_part(file: BufferedReader, info: TensorInfo, part: slice, into: torch.Tensor) -> None:
    """Read a part of a tensor's bytes into memory on the CPU, uint8, of the same length.

    Raises StageError where the file ends.

    file: the tensor's; several threads may read from it at once.
    """
    view, got = memoryview(into.numpy().data), 0
    while got < len(view):
        n = os.preadv(file.fileno(), [view[got:]], info.offset + part.start + got)
        if not n:
            raise StageError(f"{info.file}: {info.name!r} ends after {part.start + got} of {info.nbytes} bytes")
        got += n


def read_json(file: Path, *, constants: bool = False) -> dict[str, Any]:
    """A JSON object from `file`, read strictly (`requant_eval.strict_json`).

    Raises InputError when it is missing, not JSON, beyond the limits, or not an object.
    constants: whether NaN and infinities are numbers.
    """
    try:
        value = strict_json.load(file, constants=constants)
    except FileNotFoundError:
        raise InputError(f"{file}: missing: copy it there, or name the directory that has it") from None
    except strict_json.JsonError as error:
        raise InputError(f"{file}: {error}") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def quantization_in(config: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """The `quantization_config` in the content of a config.json, empty without one.

    It is where transformers looks for it: at the top, else in text_config. Raises InputError for what is no object.
    """
    text = config.get("text_config")
    places = {"": config, "text_config.": text if isinstance(text, Mapping) else {}}
    found = {f"{where}quantization_config": section.get("quantization_config") for where, section in places.items()}
    for key, value in found.items():
        if value is not None and not isinstance(value, dict):
            raise InputError(
                f"{file}: {key} is {value!r:.80}, expected an object: remove it if the weights are 16-bit, or download "
                "the file again"
            )
    return next(filter(None, found.values()), {})


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> shard, as an index file says; every shard is a file beside the index.

    Raises InputError for an index without a map, and for what is no name of a safetensors file in its directory.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: no weight_map: download the file again")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(
                f"{index}: weight_map says that {name[:80]!r} is in {file!r:.80}, expected a .safetensors file in the "
                "same directory: download the file again"
            )
    return weight_map


def _tables(path: Path) -> dict[str, TensorInfo]:
    index = path / INDEX
    if index.exists():
        return _shards(index)
    files = sorted(path.glob("*.safetensors"))
    if (path / SINGLE).exists():
        return read_header(path / SINGLE)
    if len(files) == 1:
        return read_header(files[0])
    if files:
        raise InputError(f"{path}: {len(files)} safetensors files but no {INDEX}: download the whole repository")
    pickles = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickles:
        raise InputError(
            f"{path}: only pickled weights ({pickles[0].name}); requant never loads pickles. "
            "Convert them to safetensors first (transformers: save_pretrained)"
        )
    gguf = sorted(path.glob("*.gguf"))
    if gguf:
        raise InputError(
            f"{path}: only GGUF weights ({gguf[0].name}): no adapter was trained on these. "
            "Use the 16-bit or bitsandbytes model that the adapter names as its base"
        )
    raise InputError(f"{path}: no safetensors weights found: download the whole repository, or name another directory")


def _shards(index: Path) -> dict[str, TensorInfo]:
    """The tensors of all shards that an index names; servers load those too that it does not list."""
    weight_map = read_weight_map(index)
    files = sorted(set(weight_map.values()))
    if SINGLE not in files and (index.parent / SINGLE).exists():
        raise InputError(
            f"{index}: does not name {SINGLE}, which is there too: some servers load the one, some the other: move "
            "away what is old"
        )
    infos: dict[str, TensorInfo] = {}
    for file in files:
        shard = read_header(index.parent / file)
        twice = next((name for name in shard if name in infos), None)
        if twice is not None:
            raise InputError(
                f"{index.parent}: {twice!r} is in {infos[twice].file.name} and in {file}: which one counts? Download "
                "the model again"
            )
        infos |= shard
    lost = [name for name, file in weight_map.items() if name not in infos or infos[name].file.name != file]
    if lost:
        raise InputError(f"{index}: {len(lost)} tensors are not in the shards it names, e.g. {lost[0]!r}")
    listed = {name: infos[name] for name in weight_map}
    return listed | infos


def file_digest(file: Path) -> str:
    """sha256 of a regular file's content, as hex; OSError where it cannot be read."""
    with open_regular(file) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
