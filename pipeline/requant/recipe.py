"""What the user asked for: the recipe as a whole, and a readable error for everything that it cannot mean.

Reads no weights, imports neither torch nor transformers.
The sections are in `recipe_model` and `recipe_text`, YAML in `yaml_source`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, ValidationInfo, field_validator

from requant import yaml_source
from requant.errors import RecipeError
from requant.recipe_gates import Gate, Gates, undecidable
from requant.recipe_model import (
    DEVICE,
    PATTERNS,
    AnySource,
    AsTuple,
    Base,
    Merge,
    Nf4,
    Output,
    Override,
    Quantize,
    Section,
    Slug,
    Source,
    WeightedAdapter,
    Whole,
    absolute,
    fail,
)
from requant.recipe_text import Calibration, Data, EvalSet, Evaluate, Format, MixEntry, Variant
from requant.yaml_source import Document, KeyPath, show_value

__all__ = [
    "Base",
    "Calibration",
    "Data",
    "EvalSet",
    "Evaluate",
    "Format",
    "Gate",
    "Merge",
    "MixEntry",
    "Nf4",
    "Output",
    "Override",
    "Quantize",
    "Recipe",
    "Source",
    "Variant",
    "WeightedAdapter",
    "dump",
    "json_schema",
    "load",
    "parse",
]


class Recipe(Section):
    """One fine-tune on its way to a GPTQ checkpoint and its report."""

    version: Annotated[Literal[1], Whole] = Field(default=1, description="Version of this schema.")
    name: Slug = Field(description="Name of the run and of its directory.")
    base: Base = Field(description="The model that the adapter was trained on.")
    adapters: Annotated[tuple[WeightedAdapter, ...], AsTuple] = Field(
        default=(), description="Instead of adapter: several LoRA adapters, whose deltas are added up."
    )
    adapter: AnySource | None = Field(
        default=None, validate_default=True, description="The PEFT adapter: directory or hub id."
    )
    merge: Merge = Field(default=Merge(), description="How the adapter is folded in.")
    quantize: Quantize = Field(default=Quantize(), description="The GPTQ settings.")
    calibration: Calibration = Field(description="The text on which the quantizer looks.")
    evaluate: Evaluate = Field(description="The text on which the result is judged.")
    gates: Gates = Field(
        default=(), description="How much loss is acceptable: run's exit code says whether it is kept."
    )
    output: Output = Field(default=Output(), description="Where results go.")
    device: Annotated[str, Field(pattern=DEVICE)] = Field(
        default="auto", description="auto: the first GPU, else the CPU."
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model repository.")
    _directory: Path = PrivateAttr(default=Path())

    @property
    def directory(self) -> Path:
        """Directory that relative input paths are relative to: the recipe file's."""
        return self._directory

    @property
    def weighted_adapters(self) -> tuple[tuple[Source, float], ...]:
        """(adapter, weight) of every adapter; at least one."""
        one = ((self.adapter, 1.0),) if self.adapter else ()
        return one or tuple((a, a.weight) for a in self.adapters)

    @field_validator("adapter")
    @classmethod
    def _one_or_several(cls, adapter: Source | None, info: ValidationInfo) -> Source | None:
        several = info.data.get("adapters")
        if adapter is None and several == ():
            fail((("adapter",), "required key is missing"))
        if adapter is not None and several:
            fail(((), "adapters is set too: keep one of the two keys"))
        return adapter

    @field_validator("merge")
    @classmethod
    def _original_to_merge_onto(cls, merge: Merge, info: ValidationInfo) -> Merge:
        if merge.onto == "original" and _lacks_original(info):
            fail((("onto",), f"original {_NEEDS_ORIGINAL}"))
        return merge

    @field_validator("evaluate")
    @classmethod
    def _judged_on_other_text(cls, evaluate: Evaluate, info: ValidationInfo) -> Evaluate:
        problems: list[tuple[KeyPath, str]] = []
        if "original" in evaluate.variants and _lacks_original(info):
            problems.append((("variants", evaluate.variants.index("original")), f"original {_NEEDS_ORIGINAL}"))
        calibration = info.data.get("calibration")
        if calibration is not None:
            directory = info.context if isinstance(info.context, Path) else Path()
            seen = {
                entry.data.identity(directory): f"calibration.mix.{i}.data" if calibration.mix else "calibration.data"
                for i, entry in enumerate(calibration.entries)
            }
            for i, item in enumerate(evaluate.sets):
                key = seen.get(item.data.identity(directory))
                if key:
                    message = f"is the same text as {key}: judge on text that the quantizer has not seen"
                    problems.append((("sets", i, "data"), message))
        if problems:
            fail(*problems)
        return evaluate

    @field_validator("gates")
    @classmethod
    def _decidable(cls, gates: tuple[Gate, ...], info: ValidationInfo) -> tuple[Gate, ...]:
        evaluate = info.data.get("evaluate")
        found = undecidable(gates, evaluate) if isinstance(evaluate, Evaluate) else []
        if found:
            fail(*found)
        return gates


_NEEDS_ORIGINAL = "needs the 16-bit base: set base.original, or base.nf4 if base.model itself is 16-bit"


def _lacks_original(info: ValidationInfo) -> bool:
    base = info.data.get("base")
    return isinstance(base, Base) and base.sixteen_bit is None


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `--set` overrides such as `quantize.bits=3`.

    Raises:
        RecipeError: with all problems at once, one line each, in the order of the file.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such file: `requant init ADAPTER > {path.name}` writes one") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text: a recipe is a YAML file") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    return parse(text, source=str(path), overrides=overrides, directory=path.parent)


def parse(text: str, *, source: str = "recipe.yaml", overrides: Sequence[str] = (), directory: Path) -> Recipe:
    """Read a recipe from text; `source` is its name in messages, `directory` where its relative inputs start.

    Raises:
        RecipeError: as in `load`.
    """
    document = yaml_source.read(text, source)
    if overrides:
        _spell_out_sources(document.data)
    for setting in overrides:
        document.override(setting)
    document.interpolate()
    directory = directory.absolute()
    try:
        recipe = Recipe.model_validate(document.data, context=directory)
    except ValidationError as error:
        _add_validation_errors(document, error.errors(include_url=False))
    if document.problems:
        raise RecipeError(document.problems)
    recipe._directory = directory
    return recipe


def dump(recipe: Recipe, directory: Path | None = None) -> str:
    """YAML with every default written out: `parse(dump(x), directory=x.directory) == x`.

    Args:
        directory: where the text will be saved; relative input paths are rewritten as seen from there.
    """
    data = recipe.model_dump(mode="json")
    return yaml_source.write(_moved(data, recipe.directory, directory) if directory else data)


def _moved(value: Any, old: Path, new: Path) -> Any:
    """Dumped data with relative local paths of `old` as seen from `new`."""
    if isinstance(value, list):
        return [_moved(item, old, new) for item in value]
    if not isinstance(value, dict):
        return value
    moved = {key: _moved(item, old, new) for key, item in value.items()}
    for key in {"path", "model"} & moved.keys():
        text = moved[key]
        if not isinstance(text, str) or text.startswith(("/", "~")):
            continue
        if "dataset" in moved or Source(path=text).is_local(old):
            moved[key] = f"./{os.path.relpath(absolute(text, old), new)}"
    return moved


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, for editors."""
    schema = Recipe.model_json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "requant recipe"}


def _spell_out_sources(data: dict[str, Any]) -> None:
    """`adapter: x` -> `adapter: {path: x}`, so that an override can reach adapter.revision."""
    base = data.get("base")
    for section, key in ((data, "adapter"), (base, "original")):
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = {"path": section[key]}


# --- pydantic's errors as problem lines ---


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The one section class inside a field's annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_of, get_args(annotation))), None)


def _known_keys(path: KeyPath) -> list[str]:
    """The keys of the section at `path`; list positions and module patterns are stepped over."""
    section: type[BaseModel] = Recipe
    for step in path:
        field = section.model_fields.get(str(step))
        section = (_section_of(field.annotation) if field else None) or section
    return list(section.model_fields)


def _unknown_key(key: str, known: Sequence[str]) -> str:
    """Message for a key that the section doesn't have."""
    close = difflib.get_close_matches(key, known, n=1)
    return f"unknown key, did you mean {close[0]!r}?" if close else f"unknown key, known here: {', '.join(known)}"


_PHRASES: dict[str, str] = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "non-empty text",
    "tuple_type": "a list",
    "too_short": "a list of at least one item",
    "dict_type": "a section (key: value lines)",
    "model_type": "a section (key: value lines)",
    "model_attributes_type": "a section (key: value lines)",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
}


def _add_validation_errors(document: Document, errors: Sequence[Mapping[str, Any]]) -> None:
    """Turn pydantic's error dicts into problem lines of `document`."""
    wanted: dict[KeyPath, tuple[Any, list[str]]] = {}
    located = [(_locate(document.data, error), error) for error in errors]
    for path, error in located:
        kind, context = error["type"], error.get("ctx", {})
        if "problems" in context:
            for steps, message in context["problems"]:
                document.report((*path, *steps), message)
        elif kind == "extra_forbidden":
            document.report(path, _unknown_key(str(path[-1]), _known_keys(path[:-1])))
        elif kind == "missing":
            document.report(path, "required key is missing")
        elif kind == "literal_error" and any(other[: len(path)] == path != other for other, _ in located):
            pass  # the other arm of a union was meant, and has its own errors
        else:
            wanted.setdefault(path, (error["input"], []))[1].append(_expectation(error))
    for path, (value, phrases) in wanted.items():
        expected = " or ".join(dict.fromkeys(phrases))
        document.report(
            path, f"empty, expected {expected}" if value is None else f"{show_value(value)} is not {expected}"
        )


def _locate(data: Any, error: Mapping[str, Any]) -> KeyPath:
    """The error's location without the names of union members, which are not keys of the document."""
    path: KeyPath = ()
    for step in error["loc"]:
        inside = isinstance(data, dict) and step in data
        inside = inside or (isinstance(data, list) and isinstance(step, int) and step < len(data))
        if inside:
            data = data[step]
            path = (*path, step)
    return (*path, error["loc"][-1]) if error["type"] == "missing" else path


def _expectation(error: Mapping[str, Any]) -> str:
    context = error.get("ctx", {})
    if error["type"] == "literal_error":
        values = context["expected"].replace(" or ", ", ")
        return values.replace("'", "") if ", " not in values else f"one of {values}".replace("'", "")
    if error["type"] == "string_pattern_mismatch":
        return PATTERNS[context["pattern"]]
    phrase = _PHRASES.get(error["type"])
    return phrase.format(**context) if phrase else f"accepted: {error['msg']}"
