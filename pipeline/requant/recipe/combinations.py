"""The combinations of a sweep: one recipe for each choice of values, with a name of its own."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from requant.errors import RecipeError
from requant.recipe.override_values import split_setting, steps_of
from requant.recipe.schema import Overrides, Recipe
from requant.recipe.yaml_document import value_of

MOST = 256  # combinations of one sweep
LONGEST = 100  # characters of a run's name, as the recipe's `name`
Settings = Sequence[str] | Mapping[str, Sequence[Any]]
"""Values to combine: `{"quantize.bits": [3, 4]}`, or lines as `--set` takes them, `["quantize.bits=3,4"]`."""
_NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One recipe of a sweep. settings: its values of the keys that differ, as `--set` spells them."""

    recipe: Recipe
    settings: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The directory of its run."""
        return Path(self.recipe.output.dir) / self.recipe.name

    def __str__(self) -> str:
        return f"{self.recipe.name} ({', '.join(self.settings)})"


def combinations(load: Callable[[Overrides], Recipe], settings: Settings) -> tuple[Combination, ...]:
    """Every combination of the values, the last key's changing first.

    load: the recipe with overrides, such as `partial(requant.recipe.load, path)`. Raises RecipeError for a setting
    without values, no key with several, a recipe that does not hold, and combinations that ask for the same or whose
    runs would have the same directory.
    """
    values = _values(settings)
    varied = [key for key, several in values.items() if len(several) > 1]
    if not varied:
        raise RecipeError("a sweep combines the values of a key, such as --set quantize.bits=3,4: give one several")
    count = math.prod(len(several) for several in values.values())
    if count > MOST:
        raise RecipeError(f"{count} combinations: at most {MOST} are run in one sweep: leave out values")
    lines = not isinstance(settings, Mapping)
    made = []
    for chosen in product(*values.values()):
        own = dict(zip(values, chosen, strict=True))
        made.append(_combination(load, own, varied, lines=lines))
    _refuse_same(made)
    return tuple(made)


def _values(settings: Settings) -> dict[str, list[Any]]:
    """Key -> its values; raises RecipeError where there are none, or a key is given twice."""
    if isinstance(settings, Mapping):
        found = {key: _listed(key, several) for key, several in settings.items()}
    else:
        found = {}
        for setting in [settings] if isinstance(settings, str) else settings:
            key, text = split_setting(setting)
            if key in found:
                raise RecipeError(f"--set {key}: given twice: write its values into one, {key}=VALUE,VALUE")
            if text.rstrip().endswith(","):
                raise RecipeError(f"--set {setting}: there is no value after the last comma")
            found[key] = value_of(f"[{text}\n]", f"--set {key}")
    for key, several in found.items():
        if not several:
            raise RecipeError(f"--set {key}: no values: write them with commas between, such as quantize.bits=3,4")
    return found


def _listed(key: str, several: Any) -> list[Any]:
    if isinstance(several, str | Mapping) or not isinstance(several, Iterable):
        raise RecipeError(f"{key}: expected a list of values, such as {{'quantize.bits': [3, 4]}}, got {several!r}")
    return list(several)


def _combination(
    load: Callable[[Overrides], Recipe], own: Mapping[str, Any], varied: Sequence[str], *, lines: bool
) -> Combination:
    """The recipe with its own values and name; its errors begin with the combination."""
    settings = tuple(f"{key}={_shown(own[key])}" for key in varied)

    def loaded(values: Mapping[str, Any]) -> Recipe:
        try:
            return load([f"{key}={json.dumps(value)}" for key, value in values.items()] if lines else values)
        except RecipeError as error:
            raise RecipeError([f"{', '.join(settings)}: {problem}" for problem in error.problems]) from error

    recipe = loaded(own)
    suffixes = [f"{_short(key, varied)}{_slug(own[key])}" for key in varied if key != "name"]
    name = "-".join([recipe.name, *suffixes])
    if len(name) > LONGEST:
        raise RecipeError(
            f"{', '.join(settings)}: its run would be called {name}: {len(name)} characters, at most {LONGEST}: give "
            "the recipe a shorter name (--set name=...)"
        )
    return Combination(recipe=loaded({**own, "name": name}), settings=settings)


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value, default=str)


def _short(key: str, varied: Sequence[str]) -> str:
    """The last step of a key, with those before it that tell it from the other keys."""
    steps = steps_of(key)
    for count in range(1, len(steps)):
        if sum(steps_of(other)[-count:] == steps[-count:] for other in varied) == 1:
            return _slug(".".join(steps[-count:]))
    return _slug(".".join(steps))


def _slug(value: Any) -> str:
    """A value in characters of a run's name."""
    if isinstance(value, Mapping):
        return "-".join(f"{_slug(key)}{_slug(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "-".join(map(_slug, value))
    if isinstance(value, str | Path):
        return _NO_NAME.sub("-", str(value)).strip("-.")
    return _NO_NAME.sub("-", json.dumps(value, default=str))


def _refuse_same(made: Sequence[Combination]) -> None:
    """Raise RecipeError for two combinations that ask for the same, or write into the same directory."""
    asked: dict[str, Combination] = {}
    places: dict[str, Combination] = {}
    for one in made:
        content = json.dumps(one.recipe.model_dump(mode="json", exclude={"name"}), sort_keys=True)
        other = asked.setdefault(content, one)
        if other is not one:
            raise RecipeError(f"{other} and {one} ask for the same: leave one of the two out")
        other = places.setdefault(os.path.realpath(one.path).casefold(), one)
        if other is not one:
            raise RecipeError(
                f"{other} and {one} would be the same run, {one.path}: give values whose names differ, or names "
                "(--set name=...)"
            )
