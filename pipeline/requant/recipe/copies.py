"""A recipe as YAML again: whole, as a run keeps it, as a report shows it.

`${env:VAR}` stays as it was written, and values of variables that are hidden (`outgoing`) are written so wherever they
stand, which reads back as the same recipe.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from requant import outgoing
from requant.recipe.fields import Source, absolute
from requant.recipe.schema import Recipe
from requant.recipe.yaml_document import KeyPath
from requant_eval import escaping

_ENV_DEFAULT = re.compile(r"(\$\{env:\w+):-[^}]*[/~][^}]*\}")
_OF_FILES = {"dataset", "few_shot"}  # keys of sections whose path is a file, never a hub id
_LAST_PART = re.compile(r"(?:\$\{[^}]*\}|[^/])*$")


def dump(recipe: Recipe, directory: str | Path | None = None) -> str:
    """YAML with every default written out: `parse(dump(x), directory=x.directory) == x`.

    Args:
        directory: the run's, where the text will be saved: local paths are rewritten as seen from there, in the home
            directory with `~`, and `output.dir` is only named (`load` takes the place of the file for it).
    """
    data = _data(recipe)
    if directory is None:
        return escaping.yaml(_as_written(data, recipe))
    new = Path(directory).absolute()
    moved = _with_paths(data, lambda text, known: _from(text, recipe.directory, new, known=known))
    moved = _as_written(moved, recipe, f"./{os.path.relpath(recipe.directory, new)}/")
    if moved["output"]["dir"].startswith("/"):
        moved["output"]["dir"] = Path(moved["output"]["dir"]).name or "runs"
    return escaping.yaml(moved)


def public(recipe: Recipe) -> str:
    """The recipe as YAML for a report: of absolute paths only the last part."""
    data = _as_written(_data(recipe), recipe)
    data = _with_paths(data, lambda text, known: _name(text))
    data["output"]["dir"] = _name(data["output"]["dir"])
    return escaping.yaml(outgoing.everywhere(data, outgoing.shared))


def _data(recipe: Recipe) -> Any:
    """The recipe as plain data, without the bits that its budget stands in place of."""
    data = recipe.model_dump(mode="json")
    if data["quantize"]["budget"] is not None:
        del data["quantize"]["bits"]
    return data


def _with_paths(value: Any, change: Any) -> Any:
    """Dumped data with `change(text, is a file)` in place of each path or hub id."""
    if isinstance(value, list):
        return [_with_paths(item, change) for item in value]
    if not isinstance(value, dict):
        return value
    rewritten = {key: _with_paths(item, change) for key, item in value.items()}
    for key in {"path", "model"} & rewritten.keys():
        if isinstance(rewritten[key], str):
            rewritten[key] = change(rewritten[key], bool(_OF_FILES & rewritten.keys()))
    return rewritten


def _from(text: str, old: Path, new: Path, *, known: bool) -> str:
    """A path that starts at `old` as seen from `new`; `known` to be one, or a hub id, which stays as it is.

    An absolute path that has nothing in common with `new` stays, so that it is found again.
    """
    if text.startswith("~") or not (known or Source(path=text).is_local(old)):
        return text
    path, home = absolute(text, old), Path.home()
    near = os.path.commonpath([path, new]) != os.path.sep
    if not text.startswith("/") or near:
        return f"./{os.path.relpath(path, new)}"
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else text


def _name(text: str) -> str:
    """The last part of an absolute path; other text as it is, without paths among the defaults of variables."""
    text = _ENV_DEFAULT.sub(r"\1}", text)
    if not text.startswith(("/", "~")):
        return text
    found = _LAST_PART.search(text.rstrip("/"))
    return (found[0] if found else "") or text


def _as_written(data: Any, recipe: Recipe, start: str = "") -> Any:
    """Dumped data with texts as they were written, before variables were put in.

    start: put before the text of a relative path that was rewritten.
    """
    for path, (written, stands_for) in recipe.written.items():
        holder, key = _holder(data, path)
        if holder is None:
            continue
        if holder[key] == stands_for:
            holder[key] = written
        elif key in ("path", "model"):
            holder[key] = written if stands_for.startswith(("/", "~")) else f"{start}{written}"
    return outgoing.everywhere(data, outgoing.masked)


def _holder(data: Any, path: KeyPath) -> tuple[Any, Any]:
    """The section or list that has the text at `path`, and its key there; (None, None) where there is no text."""
    try:
        for step in path[:-1]:
            data = data[step]
        if isinstance(data[path[-1]], dict):  # a source written as text alone
            data, path = data[path[-1]], ("path",)
        return (data, path[-1]) if isinstance(data[path[-1]], str) else (None, None)
    except (KeyError, IndexError, TypeError):
        return None, None
