"""Text files that a recipe names: line, key and nearest name of one that is missing."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from requant.errors import RecipeError
from requant.recipe.fields import absolute
from requant.recipe.heal_section import Heal
from requant.recipe.text_sections import Calibration
from requant.recipe.yaml_document import KeyPath
from requant_eval.regular_files import what_else

if TYPE_CHECKING:
    from requant.recipe.schema import Recipe


def check(recipe: Recipe) -> None:
    """Raise RecipeError that names every text file that does not exist or is no file, one line each."""
    wrong = [
        f"{recipe.place(*key)}: {problem}"
        for key, path in named(recipe)
        if (problem := _problem(path, recipe.directory)) is not None
    ]
    if wrong:
        raise RecipeError(list(dict.fromkeys(wrong)))


def named(recipe: Recipe) -> Iterator[tuple[KeyPath, str]]:
    """(key, path as written) of every local text."""
    for name, section in (("calibration", recipe.calibration), ("heal", recipe.heal)):
        if not isinstance(section, Calibration | Heal):
            continue  # heal: auto or off
        for i, entry in enumerate(section.entries):
            inner: KeyPath = ("mix", i, "data") if section.mix else ("data",)
            if entry.data.path is not None:
                yield (name, *inner, "path"), entry.data.path
    for i, item in enumerate(recipe.evaluate.sets):
        if item.data.path is not None:
            yield ("evaluate", "sets", i, "data", "path"), item.data.path
    for i, task in enumerate(recipe.evaluate.tasks):
        if task.path is not None:
            yield ("evaluate", "tasks", i, "path"), task.path
    if recipe.canaries is not None:
        yield ("canaries", "path"), recipe.canaries.path


def _problem(path: str, directory: Path) -> str | None:
    """What is wrong with a text's path; None: a file is there."""
    wanted = absolute(path, directory)
    try:
        other = what_else(os.stat(wanted))
    except FileNotFoundError:
        return _missing(path, directory)
    except OSError as error:
        return f"{wanted}: cannot be read ({error.strerror or error})"
    return other and f"{wanted}: {other}"


def _missing(path: str, directory: Path) -> str:
    """What is not there, and what is."""
    wanted = absolute(path, directory)
    if absolute(path, Path.cwd()).exists():
        return f"{wanted}: no such file: paths begin at the recipe's directory, and {path} is in the current one"
    last = wanted
    while not last.parent.is_dir():
        last = last.parent
    kind = "file" if last == wanted else "directory"
    there = sorted(name for name in os.listdir(last.parent) if not name.startswith("."))
    near = difflib.get_close_matches(last.name, there, n=1, cutoff=0.7)
    hint = f"did you mean {near[0]}?" if near else f"{last.parent} holds {', '.join(there[:5]) or 'nothing'}"
    return f"{last}: no such {kind}: {hint}"
