"""What a release promises: keys of recipe and report.json, signatures of the Python API.

`python -m helpers.contracts`, started in tests/, writes tests/contracts/ anew: for a release (docs/versions.md).
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "tests" / "contracts"
LEAST = ("minimum", "exclusiveMinimum", "minLength", "minItems")
MOST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems")
BOUNDS = dict.fromkeys(LEAST, 1) | dict.fromkeys(MOST, -1)
"""Keyword -> 1 where a larger number accepts less, -1 where it accepts more."""
LOOSE = (
    "title",
    "description",
    "examples",
    "default",
    "$defs",
    "properties",
    "items",
    "additionalProperties",
    "required",
)
Key = dict[str, Any]


def keys_of(schema: dict[str, Any]) -> dict[str, Key]:
    """`quantize.bits` -> whether it is required, its default, and what it takes, of every key of a JSON Schema."""
    found: dict[str, Key] = {}
    _collect(schema, schema, "", found, ())
    return found


def _collect(part: Any, schema: Key, path: str, found: dict[str, Key], above: tuple[str, ...]) -> None:
    for one in _alternatives(part, schema):
        name = str(one.get("title", ""))
        if name and name in above and "properties" in one:  # a section within itself
            continue
        for key, value in one.get("properties", {}).items():
            place = f"{path}.{key}".lstrip(".")
            entry = found.setdefault(place, {"required": key in one.get("required", ()), "takes": []})
            if not isinstance(value.get("default", {}), dict):  # of a section the defaults of its keys
                entry["default"] = value["default"]
            entry["takes"] += [t for t in map(_plain, _alternatives(value, schema)) if t not in entry["takes"]]
            _collect(value, schema, place, found, (*above, name))
        for inner, mark in ((one.get("items"), "[]"), (one.get("additionalProperties"), ".*")):
            if isinstance(inner, dict):
                _collect(inner, schema, path + mark, found, (*above, name))


def _alternatives(part: Any, schema: Key) -> Iterator[Key]:
    """The parts of a union, each without reference."""
    if "$ref" in part:
        yield from _alternatives(schema["$defs"][part["$ref"].rpartition("/")[2]], schema)
    elif "properties" not in part and (union := part.get("anyOf") or part.get("oneOf")):
        for one in union:
            yield from _alternatives(one, schema)
    else:
        yield part


def _plain(part: Key) -> Key:
    """Type, values, bounds and pattern alone; a constant is a list of one value."""
    plain = {key: value for key, value in part.items() if key not in LOOSE}
    if "const" in plain:
        plain["enum"] = [plain.pop("const")]
    return plain


def accepts(wide: list[Key], narrow: list[Key]) -> bool:
    """Whether every alternative of `narrow` is one of `wide`, or part of one."""
    return all(any(_covers(w, n) for w in wide) for n in narrow)


def _covers(wide: Key, narrow: Key) -> bool:
    if "enum" in narrow:
        return all(value in wide.get("enum", [value]) for value in narrow["enum"]) and (
            "enum" in wide or wide.get("type") == narrow.get("type")
        )
    for key, value in wide.items():
        if key in BOUNDS:
            if key not in narrow or (narrow[key] - value) * BOUNDS[key] < 0:
                return False
        elif narrow.get(key) != value:
            return False
    return True


def broken_input(old: dict[str, Key], new: dict[str, Key]) -> list[str]:
    """What a file written for `old` could not say any more, or would say something else with."""
    said = []
    for key, was in old.items():
        now = new.get(key)
        if now is None:
            said.append(f"{key}: is gone")
        elif now.get("default") != was.get("default"):
            said.append(f"{key}: the default was {was.get('default')!r}, is {now.get('default')!r}")
        elif now["required"] and not was["required"]:
            said.append(f"{key}: is required now")
        elif not accepts(now["takes"], was["takes"]):
            said.append(f"{key}: took {was['takes']}, takes {now['takes']}")
    sections = {key.rpartition(".")[0] for key in old}
    added = [k for k, v in new.items() if k not in old and v["required"] and k.rpartition(".")[0] in sections]
    return said + [f"{key}: is new and required" for key in added]


def broken_output(old: dict[str, Key], new: dict[str, Key]) -> list[str]:
    """What a reader written for `old` would not find, or find of another type. New keys and new values may come."""
    said = []
    for key, was in old.items():
        now = new.get(key)
        if now is None or (was["required"] and not now["required"]):
            said.append(f"{key}: is gone" if now is None else f"{key}: may be missing now")
        elif not {json.dumps(t.get("type")) for t in now["takes"]} <= {json.dumps(t.get("type")) for t in was["takes"]}:
            said.append(f"{key}: was {was['takes']}, is {now['takes']}")
    return said


def python_api() -> dict[str, list[list[Any]]]:
    """Name on docs/api.md -> [parameter, kind, whether it may be left out] of each, in order."""
    names = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    found = {}
    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            signature = inspect.signature(getattr(importlib.import_module(module), attribute))
        except ValueError:  # of an exception class
            found[name] = []
            continue
        found[name] = [[p.name, p.kind.name, p.default is not p.empty] for p in signature.parameters.values()]
    return found


def broken_calls(old: dict[str, list[list[Any]]], new: dict[str, list[list[Any]]]) -> list[str]:
    """Which calls that were right are an error now."""
    said = []
    for name, before in old.items():
        now = {parameter: (kind, optional) for parameter, kind, optional in new.get(name, [])}
        if name not in new:
            said.append(f"{name}: is gone")
        for parameter, kind, optional in before:
            kind_now, optional_now = now.get(parameter, ("GONE", True))
            if kind_now not in (kind, "POSITIONAL_OR_KEYWORD") or (optional and not optional_now):
                said.append(f"{name}({parameter}): is gone, or required now, or takes no place")
        known = {parameter for parameter, _, _ in before}
        new_ones = [p for p, (kind, optional) in now.items() if p not in known and not optional and "VAR" not in kind]
        said += [f"{name}({parameter}): is new and required" for parameter in new_ones]
        places = [[p for p, kind, _ in part if kind != "KEYWORD_ONLY"] for part in (before, new.get(name, []))]
        if places[1][: len(places[0])] != places[0]:
            said.append(f"{name}: its places are {places[1]}, were {places[0]}")
    return said


def versions() -> tuple[int, int]:
    """(version of the recipe, schema_version of report.json) of this code."""
    from requant.recipe import Recipe
    from requant_eval.report.assemble import SCHEMA_VERSION

    return Recipe.model_fields["version"].default, SCHEMA_VERSION


def current() -> dict[str, Any]:
    """File in tests/contracts -> what this code has for it."""
    from requant.recipe import json_schema
    from requant_eval.report import schema

    recipe, report = versions()
    return {
        f"recipe-{recipe}.json": keys_of(json_schema()),
        f"report-{report}.json": keys_of(schema.json_schema()),
        "python.json": python_api(),
    }


if __name__ == "__main__":
    for file, value in current().items():
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items())
        (STORED / file).write_text(f"{{\n{lines}\n}}\n")
