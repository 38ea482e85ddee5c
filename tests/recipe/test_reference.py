"""docs/recipe.md is what the schema says; a section takes its own examples."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from requant.recipe import Recipe, json_schema, parse, reference
from requant.recipe.fields import Section

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"
SHARED = {"Section"}


def sections(of: type[Section] = Section) -> dict[str, type[Section]]:
    found = {of.__name__: of}
    for below in of.__subclasses__():
        found |= sections(below)
    return {name: section for name, section in found.items() if name not in SHARED}


SECTIONS = sections()


def examples(section: type[Section]) -> list[dict[str, Any]]:
    extra = section.model_config["json_schema_extra"]
    assert isinstance(extra, dict)
    found = extra["examples"]
    assert isinstance(found, list)
    return found


def test_the_page_is_what_the_schema_says() -> None:
    assert PAGE.read_text() == reference.markdown(), "python -m requant.recipe.reference > docs/recipe.md"


def test_the_sections_are_those_of_the_schema() -> None:
    assert SECTIONS.keys() == json_schema()["$defs"].keys() | {"Recipe"}


@pytest.mark.parametrize("name", SECTIONS)
def test_examples_are_valid_and_have_every_key(name: str) -> None:
    section = SECTIONS[name]
    shown = examples(section)
    for example in shown:
        section.model_validate(example)
    assert {key for example in shown for key in example} == set(section.model_fields)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_has_a_row_and_every_section_its_examples(name: str) -> None:
    headings = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    fields = SECTIONS[name].model_fields
    own = [part for part in headings if all(f"\n| `{key}` | " in part for key in fields)]
    described = [part for part in own if len(re.findall(r"^\| `", part, re.MULTILINE)) == len(fields)]
    assert len(described) == 1


def test_the_examples_of_whole_recipes_on_the_page_are_recipes() -> None:
    smallest, every_key = re.findall(
        r"^```yaml\n(name.*?|version.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )[:2]
    assert parse(smallest, directory=Path("/nowhere")).adapter is not None
    whole = parse(every_key, directory=Path("/nowhere"))
    assert whole.model_fields_set | {"adapter"} == set(Recipe.model_fields)
    assert (whole.heal, len(whole.adapters)) == ("off", 2)


def test_limits_of_numbers_are_told() -> None:
    page = PAGE.read_text()
    for said in (
        "| `samples` | whole number from 1 to 65,536 | `128` |",
        "| `seed` | whole number from 0 to 4,294,967,295 | `0` |",
        "| `damp` | `auto` or number above 0 under 1 | `auto` |",
        "| `max_shard` | a size such as 5GB or 500MB | `5GB` |",
        "| `overrides` | map of text to [section](#quantizeoverridespattern) | `{}` |",
    ):
        assert said in page
