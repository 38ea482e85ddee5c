"""docs/recipe.md: every key with value, default, meaning and example, from the JSON Schema.

`python -m requant.recipe.reference > docs/recipe.md` writes it.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from requant.recipe.fields import PATTERNS
from requant.recipe.schema import json_schema

_HEAD = """\
# The recipe, key by key

Written by `python -m requant.recipe.reference` from the schema that reads recipes. An unknown key or a wrong value is
an error that names file, line and key. `requant init ADAPTER` writes a recipe with comments; `--set quantize.bits=8`
changes a key for one run.

A default of `-` means none, or of a section the defaults of its keys. `[]` after a name means a list of such sections.
Relative input paths are relative to the recipe. `${env:NAME}` stands for a variable of the environment,
`${env:NAME:-x}` for it or x.

In an editor with the YAML language server (VS Code, Neovim and others) keys are completed and explained, and wrong
ones marked: `requant init ADAPTER -o recipe.yaml` writes `requant.schema.json` beside the recipe, whose first line
names it. For a recipe that you have, and after an upgrade,

    requant schema > requant.schema.json

beside it, and as its first line

    # yaml-language-server: $schema=requant.schema.json

## The smallest recipe
"""
_TYPES = {"string": "text", "boolean": "true or false", "integer": "whole number", "number": "number"}


def markdown() -> str:
    """The page, of the schema as it is."""
    schema = json_schema()
    sections = _sections(schema)
    smallest, *further = map(_yaml, schema["examples"])
    lines = [_HEAD, smallest, "## Top level", "", *_table(schema, sections, schema["$defs"])]
    lines += ["With every key of the top level:", "", *further]
    for name, paths in sections.items():
        section = schema["$defs"][name]
        lines += [f"## `{_title(paths)}`", "", _cell(section["description"])]
        lines += [f"In {', '.join(f'`{path}`' for path in paths)}."] if len(paths) > 1 else []
        lines += ["", *_table(section, sections, schema["$defs"]), *map(_yaml, section["examples"])]
    return "\n".join(lines).rstrip() + "\n"


def _yaml(example: dict[str, Any]) -> str:
    """Innermost lists and maps in one line, as recipes are written by hand."""
    writer, stream = YAML(), io.StringIO()
    writer.default_flow_style = None
    writer.indent(mapping=2, sequence=4, offset=2)
    whole = CommentedMap(example)
    whole.fa.set_block_style()
    writer.dump(whole, stream)
    return f"```yaml\n{stream.getvalue()}```\n"


def _sections(schema: dict[str, Any]) -> dict[str, list[str]]:
    """Section -> the paths at which it stands, in the order of the recipe."""
    found: dict[str, list[str]] = {}
    names = dict(sorted(schema["$defs"].items()))

    def walk(section: dict[str, Any], at: str) -> None:
        for key, value in section["properties"].items():
            for name, suffix in _references(value):
                path = f"{at}{key}{suffix}"
                found.setdefault(name, []).append(path)
                walk(names[name], f"{path}.")

    walk(schema, "")
    assert found.keys() == names.keys()
    return found


def _references(value: dict[str, Any], suffix: str = "") -> Iterator[tuple[str, str]]:
    """(section, `[]` of a list or `.PATTERN` of a map) of the sections that a value may be."""
    if "$ref" in value:
        yield value["$ref"].rpartition("/")[2], suffix
    for part in value.get("anyOf", ()):
        yield from _references(part, suffix)
    if "items" in value:
        yield from _references(value["items"], f"{suffix}[]")
    if "additionalProperties" in value:
        yield from _references(value["additionalProperties"], f"{suffix}.PATTERN")


def _title(paths: list[str]) -> str:
    """The path of a section; of one that stands in several places the last key of the first."""
    return paths[0] if len(paths) == 1 else paths[0].rpartition(".")[2]


def _table(section: dict[str, Any], sections: dict[str, list[str]], defs: dict[str, Any]) -> Iterator[str]:
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for key, value in section["properties"].items():
        meaning = value.get("description") or defs[next(_references(value))[0]]["description"]
        default = "required" if key in section.get("required", ()) else _default(value)
        yield f"| `{key}` | {' or '.join(_values(value, sections))} | {default} | {_cell(meaning)} |"
    yield ""


def _values(value: dict[str, Any], sections: dict[str, list[str]]) -> Iterator[str]:
    """What a key may be, in words: choices, sections as links, numbers with their limits."""
    if "$ref" in value:
        title = _title(sections[value["$ref"].rpartition("/")[2]])
        yield f"[section](#{_anchor(title)})"
    elif "anyOf" in value:
        for part in value["anyOf"]:
            if part.get("type") != "null":  # a key may always be left out: its default says so
                yield from _values(part, sections)
    elif "enum" in value or "const" in value:
        yield ", ".join(f"`{_plain(choice)}`" for choice in value.get("enum", [value.get("const")]))
    elif "items" in value:
        yield f"list of {' or '.join(_values(value['items'], sections))}"
    elif "additionalProperties" in value:
        yield f"map of text to {' or '.join(_values(value['additionalProperties'], sections))}"
    elif "pattern" in value:
        yield PATTERNS[value["pattern"]]
    else:
        yield f"{_TYPES[value['type']]}{_limits(value)}"


def _limits(value: dict[str, Any]) -> str:
    """The limits of a number, in words; those of a text are far above what anybody writes."""
    if value["type"] not in ("integer", "number"):
        return ""
    low, high = value.get("minimum"), value.get("maximum")
    if value["type"] == "integer":
        low = value["exclusiveMinimum"] + 1 if "exclusiveMinimum" in value else low
        high = value["exclusiveMaximum"] - 1 if "exclusiveMaximum" in value else high
    above = f" above {value['exclusiveMinimum']:g}" if low is None and "exclusiveMinimum" in value else ""
    under = f" under {value['exclusiveMaximum']:g}" if high is None and "exclusiveMaximum" in value else ""
    first = above if low is None else f" from {_number(low)}"
    last = under if high is None else f" to {_number(high)}"
    return f"{first}{last}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _default(value: dict[str, Any]) -> str:
    """The default as it would be written; of a section its own keys' defaults, so none here."""
    default = value.get("default")
    return "-" if default is None or (default and isinstance(default, dict)) else f"`{_plain(default)}`"


def _plain(value: Any) -> str:
    """A value as YAML in one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _anchor(title: str) -> str:
    """The anchor of a heading, as GitHub and Python-Markdown make it."""
    return re.sub(r"[^\w-]", "", title.lower())


def _cell(text: str) -> str:
    """Text of a table's cell: in one line, nothing of it a new column or a placeholder."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
