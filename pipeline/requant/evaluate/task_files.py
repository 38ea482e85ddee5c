"""Task files (YAML of lm-evaluation-harness) as data: no code runs, paths are the file's.

The library's reader imports Python where a file says `!function`, and takes paths of data as seen from the current
directory. This one refuses the first, and takes the second as seen from the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from requant.errors import InputError, one_line
from requant.outgoing import masked
from requant_eval.regular_files import read_bytes

LARGEST = 10**6  # bytes of a task file
DEEPEST = 10  # files that include each other
LOADERS = ("json", "csv", "parquet", "text", "arrow")  # of the library datasets, for local files
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_NEEDS = ("task", "dataset_path", "output_type", "doc_to_text", "doc_to_target")
Function = Callable[[str, Path], Any]  # (its name, the directory of the file) -> what the file means by it


def read(file: Path, *, function: Function | None = None) -> dict[str, Any]:
    """The task of a file, with what it includes and absolute paths of data.

    function: makes what `!function NAME` stands for; without it the tag is refused. Raises InputError for what is no
    task: wrong YAML, a group, a missing key, data that is not there.
    """
    config = _merged(file, function, ())
    if "group" in config or isinstance(config.get("task"), list):
        raise InputError(f"{file}: is a group of tasks: name the file of each task in evaluate.tasks")
    missing = [key for key in _NEEDS if key not in config]
    if missing:
        raise InputError(f"{file}: {', '.join(missing)} missing: expected a task of lm-evaluation-harness")
    if "use_prompt" in config and function is None:
        raise InputError(f"{file}: use_prompt: loads another file with its code: write the prompt as doc_to_text")
    if not any(config.get(key) for key in ("test_split", "validation_split")):
        raise InputError(f"{file}: test_split or validation_split is missing: which part of its data is asked")
    return _with_data(file, config)


def _merged(file: Path, function: Function | None, above: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a file over those of the files that it includes."""
    if file in above or len(above) > DEEPEST:
        raise InputError(f"{file}: includes itself by way of {', '.join(f.name for f in above)}")
    config = _parsed(file, function)
    whole: dict[str, Any] = {}
    for other in _included(file, config):
        whole |= _merged(other, function, (*above, file))
    return whole | {key: value for key, value in config.items() if key != "include"}


def with_included(file: Path) -> list[Path]:
    """A file that `read` takes, and all that it includes."""
    config = _parsed(file, lambda *_: None)
    return [file, *(found for other in _included(file, config) for found in with_included(other))]


def _included(file: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files that a file names under `include`."""
    given = config.get("include", [])
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{file}: include: {given!r:.80}, expected the name of a file, or a list of them")
    return [(file.parent / name).resolve() for name in names]


def _parsed(file: Path, function: Function | None) -> dict[str, Any]:
    """One file's mapping."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """YAML's plain types, and `!function` as the caller takes it."""

    def of_function(loader: Any, node: Any) -> Any:
        if function is None:
            raise InputError(
                f"{file}:{node.start_mark.line + 1}: !function {node.value!s:.80}: runs Python code beside the file: "
                "write the task without it, or set trust_remote_code: true if the code is yours"
            )
        return function(str(loader.construct_scalar(node)), file.parent)

    Loader.add_constructor("!function", of_function)
    try:
        text = read_bytes(file, LARGEST + 1)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from error
    if len(text) > LARGEST:
        raise InputError(f"{file}: more than {LARGEST} bytes: no file of a task")
    try:
        config = yaml.load(text.decode("utf-8-sig"), Loader=Loader)  # of a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise InputError(f"{file}: is no YAML that is read here: {masked(one_line(error))}") from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise InputError(f"{file}: expected the keys of a task, got {type(config).__name__}")
    if _is_larger(config, 2 * LARGEST):
        raise InputError(f"{file}: its aliases (*name) stand for more than {2 * LARGEST} bytes: write fewer")
    return config


def _is_larger(value: Any, most: int) -> bool:
    """Whether a value has more characters and parts than `most`, each counted as often as an alias names it."""
    left = [value]
    while left and most >= 0:
        found = left.pop()
        most -= 1 + (len(found) if isinstance(found, str) else 0)
        if isinstance(found, Mapping):
            left += [*found.keys(), *found.values()]
        elif isinstance(found, list):
            left += found
    return most < 0


def _with_data(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The task with its local data files as absolute paths, each of which is there."""
    path = config["dataset_path"]
    if path not in LOADERS:
        if not isinstance(path, str) or not _HUB_ID.fullmatch(path):
            raise InputError(
                f"{file}: dataset_path: {path!r:.80}, expected one of {', '.join(LOADERS)}, with data_files, or a "
                "data set of a hub as owner/name"
            )
        return config
    given = config.get("dataset_kwargs")
    found = given.get("data_files") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not found:
        raise InputError(
            f"{file}: dataset_path is {config['dataset_path']}, and dataset_kwargs.data_files names no file of data"
        )
    return {**config, "dataset_kwargs": {**given, "data_files": _absolute(file, found)}}


def _absolute(file: Path, found: Any) -> Any:
    """Names of data files, in lists or by split, as absolute paths."""
    if isinstance(found, Mapping):
        return {split: _absolute(file, names) for split, names in found.items()}
    if isinstance(found, list):
        return [_absolute(file, name) for name in found]
    if not isinstance(found, str) or "://" in found:
        raise InputError(f"{file}: dataset_kwargs.data_files: {found!r:.80}, expected the path of a file")
    path = (file.parent / found).resolve()
    if not path.is_file():
        raise InputError(f"{file}: dataset_kwargs.data_files: {path}: no such file")
    return str(path)
