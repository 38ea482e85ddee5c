"""Paths of commands: a run's directory in place of its recipe, report or checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from requant.errors import InputError, RecipeError

if TYPE_CHECKING:
    from requant.recipe import Recipe

MARKER = ".requant.json"  # of a run's directory, as `checkpoint.run_directory` writes it
CHECKPOINTS = ("healed", "gptq")  # the one that is deployed first


def is_run(path: Path) -> bool:
    """Whether `path` is a directory that a run made."""
    return (path / MARKER).is_file()


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file, or the one that a run keeps in its directory."""
    from requant import recipe

    if not path.is_dir():
        return recipe.load(path, overrides)
    file = path / "recipe.yaml"
    if not file.is_file():
        raise RecipeError(f"{path}: {_holds(path)}, no recipe.yaml: name a recipe file")
    return recipe.load(file, overrides)


def checkpoint_in(path: Path, names: Sequence[str] = CHECKPOINTS) -> tuple[Path, str | None]:
    """(the checkpoint that `path` names, which one of a run it is).

    A run's healed checkpoint comes before its GPTQ one, unless it was made of another. Raises InputError for a run that
    holds none yet.
    """
    if (path / "config.json").exists() or not path.is_dir():
        return path, None
    found = [path / name for name in names if (path / name / "config.json").is_file()]
    if found:
        also = f" (also here: {', '.join(p.name for p in found[1:])})" if found[1:] else ""
        if found[1:] and _of_another(found[0], found[1]):
            del found[0]
            also = " (healed/ was made of an earlier one)"
        return found[0], f"{path} is a run: taking its {found[0].name}/{also}"
    if is_run(path):
        raise InputError(f"{path}: {_holds(path)}, no finished checkpoint yet: `requant run {path}` goes on with it")
    return path, None


def names_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file, or a directory that holds one in place of a config.json."""
    return path.suffix == ".gguf" or (
        path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.gguf"))
    )


def _of_another(healed: Path, gptq: Path) -> bool:
    """Whether a run's healed checkpoint was made of another GPTQ checkpoint than the run holds now."""
    from requant.checkpoint.artifact import read_manifest

    one, other = read_manifest(healed), read_manifest(gptq)
    made_of = (one or {}).get("provenance", {}).get("of")  # earlier versions did not say
    return other is not None and made_of not in (None, other["key"])


def merged_in(path: Path) -> Path:
    """The 16-bit model that `path` names: a run's merged one. Raises InputError for a run that keeps none."""
    if not is_run(path):
        return path
    if (path / "merged" / "config.json").is_file():
        return path / "merged"
    raise InputError(f"{path}: {_holds(path)}, no merged/: name the 16-bit model, or keep it (output.keep)")


def report_in(path: Path) -> Path:
    """The report that `path` names. Raises InputError for a run that has none yet."""
    if path.is_dir() and not (path / "report.json").is_file():
        what = f"`requant run {path}` goes on with it" if is_run(path) else "name a report.json, or a run's directory"
        raise InputError(f"{path}: {_holds(path)}, no report.json yet: {what}")
    return path


def _holds(path: Path) -> str:
    """What a directory holds, in words."""
    from requant.checkpoint.run_directory import ARTIFACTS

    names = [n for n in (*ARTIFACTS, "report.json") if (path / n).exists()]
    kind = "this run" if is_run(path) else "this directory"
    return f"{kind} holds {', '.join(names)}" if names else f"{kind} holds nothing of a run"
