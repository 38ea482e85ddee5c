"""Field types, checks and base classes that all sections of a recipe share.

Sections are frozen, strict pydantic models: unknown keys are errors and nothing is coerced.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from requant.recipe import section_examples
from requant.recipe.source_directories import near_miss
from requant.recipe.yaml_document import KeyPath, show_value

SLUG = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
DATE = r"^\d{4}-\d{2}-\d{2}$"
DEVICE = r"^(auto|cpu|cuda(:[0-9]{1,3})?)$"
SIZE = r"^(0*[1-9][0-9]{0,8}(\.[0-9]{1,9})?) ?([KMG]i?B)$"
PATTERNS = {
    DATE: "a day such as 2024-07-26",
    SLUG: "a name of letters, digits, '.', '_' and '-' that begins with a letter or digit",
    DEVICE: "one of auto, cpu, cuda, cuda:N",
    SIZE: "a size such as 5GB or 500MB",
}
"""Regular expression of the schema -> its meaning in words, for error messages."""

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")

# Bounds far above what anybody means, and below what overflows a library or is no name of a file.
Text = Annotated[str, Field(min_length=1, max_length=4000)]
Slug = Annotated[str, Field(pattern=SLUG, max_length=100)]
Positive = Annotated[int, Field(gt=0, le=10**9)]
Server = Literal["vllm", "sglang", "transformers", "gptqmodel"]
AsTuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)


def fail(*problems: tuple[KeyPath, str]) -> NoReturn:
    """Reject the value under validation; each problem is (steps from that value, message)."""
    raise PydanticCustomError("requant", "{text}", {"problems": problems, "text": problems[0][1]})


def unique(values: Sequence[str]) -> None:
    """Reject a list that names something twice."""
    twice = [(i, value) for i, value in enumerate(values) if value in values[:i]]
    if twice:
        fail(*(((i,), f"{value} is already in the list") for i, value in twice))


def absolute(path: str, directory: Path) -> Path:
    """`path` as seen from `directory`, `~` expanded, without touching the disk."""
    return Path(os.path.abspath(directory / os.path.expanduser(path)))


def size_in_bytes(text: str) -> int:
    """Bytes of a size that matches `SIZE`: GB is 10^9, GiB is 2^30."""
    unit = text.lstrip("0123456789. ")
    return int(float(text.removesuffix(unit)) * _UNITS[unit])


def looks_local(path: str) -> bool:
    """Whether the spelling alone says that this is a path and not a hub id."""
    return path.startswith(("./", "../", "/", "~")) or path in (".", "..")


def check_source(key: str, path: str, revision: str | None, info: ValidationInfo) -> None:
    """Reject a revision of a local path, and text that is neither a path nor a hub id.

    The latter only if the recipe's directory is known.
    """
    if looks_local(path):
        if revision is not None:
            fail((("revision",), f"only a hub id has one, and {key} {path!r} is a local path: remove it"))
        return
    if not isinstance(info.context, Path) or os.path.exists(info.context / path):
        return
    if not _HUB_ID.fullmatch(path):
        meant = near_miss(path, info.context / path)
        if not meant.startswith((": did you mean", ": a path of Windows")):
            meant = ": begin a path with ./"
        fail(((key,), f"{path!r} is neither an existing path nor a hub id (owner/name){meant}"))


def _whole(value: object) -> object:
    """Reject booleans and floats, since `Literal[1, 4]` accepts true and 4.0."""
    if isinstance(value, bool | float):
        fail(((), f"{show_value(value)} is not a whole number"))
    return value


Whole = BeforeValidator(_whole)
Bits = Annotated[Literal[2, 3, 4, 8], Whole]
EndBits = Annotated[Literal[4, 8], Whole]
GroupSize = Annotated[Literal[32, 64, 128, -1], Whole]


class Section(BaseModel):
    """Base class of a recipe's sections: strict and frozen.

    Unknown keys are errors, nothing is coerced, nothing changes afterwards.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Source(Section):
    """A model or an adapter: a local directory or a Hugging Face hub id. A plain string is the path."""

    model_config = section_examples.SOURCE

    path: Text = Field(
        description="Hub id, or directory: relative to the recipe, if it exists there or begins with . / ~"
    )
    revision: str | None = Field(default=None, description="Hub branch, tag or commit; default: the main branch.")

    def is_local(self, directory: Path) -> bool:
        """Whether `path` is meant as, or exists as, a path seen from `directory`."""
        return looks_local(self.path) or os.path.exists(directory / self.path)

    def resolve(self, directory: Path) -> str:
        """Absolute path of a local source, or the hub id as it is."""
        return str(absolute(self.path, directory)) if self.is_local(directory) else self.path

    @model_validator(mode="after")
    def _possible(self, info: ValidationInfo) -> Self:
        check_source("path", self.path, self.revision, info)
        return self


def or_path(section: type[Section]) -> BeforeValidator:
    """Lets a plain string stand for a section that needs no more than its `path`."""
    return BeforeValidator(
        lambda value: {"path": value} if isinstance(value, str) else value, json_schema_input_type=str | section
    )


AnySource = Annotated[Source, or_path(Source)]
