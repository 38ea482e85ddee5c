"""The whole recipe: load, parse, JSON Schema, checks that involve two sections.

Reads no weights, imports neither torch nor transformers.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, ValidationInfo, field_validator
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from requant.errors import RecipeError
from requant.recipe import section_examples, yaml_document, yaml_nodes
from requant.recipe.error_messages import add_validation_errors, near_recipe
from requant.recipe.fields import DATE, DEVICE, AsTuple, Section, Server, Slug, Whole, fail
from requant.recipe.gates_section import Gate, Gates, undecidable
from requant.recipe.heal_section import Heal
from requant.recipe.model_sections import (
    AdapterSource,
    AnyAdapter,
    Base,
    Merge,
    WeightedAdapter,
)
from requant.recipe.output_section import Output
from requant.recipe.quantize_section import Quantize
from requant.recipe.text_sections import (
    AnyCanaries,
    Calibration,
    Evaluate,
)
from requant.recipe.yaml_document import KeyPath
from requant_eval import strict_json

__all__ = ["Overrides", "Recipe", "json_schema", "load", "parse"]
Overrides = Sequence[str] | Mapping[str, Any]
"""Changed values: `{"quantize.bits": 3}`, or lines as `--set` takes them, `["quantize.bits=3"]`."""


class Recipe(Section):
    """One fine-tune on its way to a GPTQ checkpoint and its report."""

    model_config = section_examples.RECIPE

    version: Annotated[Literal[1], Whole] = Field(default=1, description="Version of this schema.")
    name: Slug = Field(description="Name of the run: results go to output.dir/name.")
    base: Base = Field(description="The model that the adapter was trained on.")
    adapters: Annotated[tuple[WeightedAdapter, ...], AsTuple] = Field(
        default=(),
        description="Instead of adapter: several LoRA adapters. Their deltas, each times its weight, are added up.",
    )
    adapter: AnyAdapter | None = Field(
        default=None, validate_default=True, description="The PEFT adapter: directory or hub id."
    )
    merge: Merge = Field(default=Merge(), description="How the adapter is folded in.")
    quantize: Quantize = Field(default=Quantize(), description="The GPTQ settings.")
    calibration: Calibration = Field(description="The text on which the quantizer looks: which errors matter.")
    chat_date: Annotated[str, Field(pattern=DATE)] = Field(
        default="2024-07-26",
        description="The day that a chat template writes as today's; fixed, so that a text never changes.",
    )
    heal: Literal["auto", "off"] | Heal = Field(
        default="auto",
        description="Distil scales and codes after quantizing. auto: on a GPU, with the defaults. A section: on any "
        "device.",
    )
    evaluate: Evaluate = Field(description="The text on which the result is judged.")
    gates: Gates = Field(
        default=(), description="How much loss is acceptable. The exit code of run says whether it is kept."
    )
    canaries: AnyCanaries | None = Field(
        default=None, description="Questions that the fine-tune answers; every scored variant is asked."
    )
    output: Output = Field(default=Output(), description="Where results go.")
    deploy: Annotated[tuple[Server, ...], AsTuple] = Field(
        default=(),
        description="Engines that must load the checkpoint, else the run ends with an error. Installed ones are asked.",
    )
    device: Annotated[str, Field(pattern=DEVICE)] = Field(
        default="auto", description="auto: the first GPU, or the CPU where there is none."
    )
    trust_remote_code: bool = Field(default=False, description="Whether Python code of the model's repository may run.")
    _directory: Path = PrivateAttr(default=Path())
    _places: yaml_document.Places = PrivateAttr(default_factory=yaml_document.Places)

    @property
    def directory(self) -> Path:
        """Directory that relative input paths are relative to: the recipe file's."""
        return self._directory

    @property
    def written(self) -> dict[KeyPath, tuple[str, str]]:
        """Of each text with `${env:VAR}`: the text itself, and what it stands for."""
        return self._places.written

    def place(self, *key: str | int) -> str:
        """`file:line: key.path` of a key, for messages about what it names."""
        return self._places.of(key)

    @property
    def weighted_adapters(self) -> tuple[tuple[AdapterSource, float], ...]:
        """(adapter, weight) of every adapter; at least one."""
        one = ((self.adapter, 1.0),) if self.adapter else ()
        return one or tuple((a, a.weight) for a in self.adapters)

    @field_validator("chat_date")
    @classmethod
    def _is_a_day(cls, text: str) -> str:
        try:
            datetime.date.fromisoformat(text)
        except ValueError as error:
            fail(((), f"{text!r} is not a day: {error}"))
        return text

    @field_validator("adapter")
    @classmethod
    def _one_or_several(cls, adapter: AdapterSource | None, info: ValidationInfo) -> AdapterSource | None:
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
        if "original" in evaluate.variants and _is_plain(info):
            problems.append((("variants", evaluate.variants.index("original")), _SAME_AS_MERGED))
        if "healed" in evaluate.variants and info.data.get("heal") == "off":
            problems.append((("variants", evaluate.variants.index("healed")), "healed is not made with heal: off"))
        problems += _without_ends(evaluate, info)
        directory = info.context if isinstance(info.context, Path) else Path()
        seen = {
            entry.data.identity(directory): f"{section}.mix.{i}.data" if source.mix else f"{section}.data"
            for section in ("heal", "calibration")
            if isinstance(source := info.data.get(section), Heal | Calibration)
            for i, entry in enumerate(source.entries)
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
_SAME_AS_MERGED = "original is merged once more: with base.nf4: none both are on base.model in 16 bit. Remove it"


def _lacks_original(info: ValidationInfo) -> bool:
    base = info.data.get("base")
    return isinstance(base, Base) and base.sixteen_bit is None


def _without_ends(evaluate: Evaluate, info: ValidationInfo) -> list[tuple[KeyPath, str]]:
    """A problem where the variant ends is asked for, and nothing that it would be."""
    quantize = info.data.get("quantize")
    if not isinstance(quantize, Quantize) or quantize.embeddings or quantize.head:
        return []
    keys: dict[str, tuple[str, ...]] = {"variants": evaluate.variants}
    keys |= {"task_variants": evaluate.task_variants} if evaluate.task_variants != "auto" else {}
    message = "ends is made with quantize.embeddings or quantize.head: set one of them"
    return [((key, names.index("ends")), message) for key, names in keys.items() if "ends" in names]


def _is_plain(info: ValidationInfo) -> bool:
    """Whether training did not quantize the base."""
    base = info.data.get("base")
    return isinstance(base, Base) and base.nf4 == "none"


def load(path: str | Path, overrides: Overrides = ()) -> Recipe:
    """Read a recipe file and apply overrides: `{"quantize.bits": 3}` or `["quantize.bits=3"]` (`--set`).

    The copy that a run keeps in its directory is of that run, wherever the directory lies.

    Raises:
        RecipeError: with all problems at once, one line each, in the order of the file.
    """
    path = Path(path)
    try:
        text = strict_json.read_bytes(path, yaml_nodes.LARGEST).decode("utf-8-sig")
    except FileNotFoundError as error:
        if path.suffix not in (".yaml", ".yml"):
            raise RecipeError(f"{path}: neither a recipe nor the directory of a run is here") from error
        raise RecipeError(f"{path}: no such file: {near_recipe(path)}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text: a recipe is a YAML file") from error
    except strict_json.JsonError as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    loaded = parse(text, source=str(path), overrides=overrides, directory=path.parent)
    here = path.parent.absolute()
    if not is_copy_of_run(path) or (Path(loaded.output.dir) / loaded.name).absolute() == here:
        return loaded
    own = {"name": here.name, "output.dir": str(path.parent.parent if path.parent.name else here.parent)}
    if isinstance(overrides, Mapping):
        return parse(text, source=str(path), overrides={**own, **overrides}, directory=path.parent)
    place = [f"{key}={json.dumps(value)}" for key, value in own.items()]
    given = [overrides] if isinstance(overrides, str) else overrides
    return parse(text, source=str(path), overrides=[*place, *given], directory=path.parent)


def is_copy_of_run(file: Path) -> bool:
    """Whether a file is the recipe that a run keeps in its directory, which it marks."""
    return file.name == "recipe.yaml" and (file.parent / ".requant.json").is_file()


def parse(text: str, *, source: str = "recipe.yaml", overrides: Overrides = (), directory: str | Path) -> Recipe:
    """Read a recipe from text.

    `source` is its name in messages, `directory` where its relative inputs start. overrides: as in `load`.

    Raises:
        RecipeError: as in `load`.
    """
    document = yaml_document.read(text, source)
    if overrides:
        _expand_sources(document.data)
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            document.override_with(key, value)
    else:
        for setting in [overrides] if isinstance(overrides, str) else overrides:
            document.override(setting)
    document.prefer_override("quantize", "bits", "budget")
    document.interpolate()
    _refuse_newer(document)
    directory = Path(directory).absolute()
    try:
        recipe = Recipe.model_validate(document.data, context=directory)
    except ValidationError as error:
        add_validation_errors(document, Recipe, error.errors(include_url=False))
    if document.problems:
        raise RecipeError(document.problems)
    recipe._directory = directory
    recipe._places = yaml_document.Places(document)
    return recipe


def _refuse_newer(document: yaml_document.Document) -> None:
    """Only the version is told of a recipe of a newer one: its other keys need not be known here."""
    known = Recipe.model_fields["version"].default
    version = document.data.get("version")
    if type(version) is int and version > known:
        document.report(("version",), f"{version} is of a newer requant, this one reads {known}: upgrade requant")
        raise RecipeError(document.problems)


class _InOrder(GenerateJsonSchema):
    """Keys of the schema, its examples among them, in the order in which the sections have them."""

    def sort(self, value: JsonSchemaValue, parent_key: str | None = None) -> JsonSchemaValue:
        return value


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, for editors."""
    schema = Recipe.model_json_schema(mode="validation", schema_generator=_InOrder)
    schema["oneOf"] = [{"required": [key]} for key in ("adapter", "adapters")]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "requant recipe"}


def _expand_sources(data: dict[str, Any]) -> None:
    """Expand plain strings to sections: `adapter: x` to `adapter: {path: x}`.

    Then `--set adapter.revision=...` has a key.
    """
    base = data.get("base")
    for section, key in ((data, "adapter"), (data, "canaries"), (base, "original")):
        if isinstance(section, dict) and isinstance(section.get(key), str):
            section[key] = {"path": section[key]}
