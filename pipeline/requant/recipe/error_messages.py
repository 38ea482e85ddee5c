"""pydantic's validation errors as lines for the user: file, line, key, value, expected."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from requant.recipe.fields import PATTERNS
from requant.recipe.yaml_document import Document, KeyPath, show_value


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside a field's annotation, None without one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section_of, get_args(annotation))), None)


def _known_keys(root: type[BaseModel], path: KeyPath) -> list[str]:
    """The keys of the section at `path`; list positions and module patterns are skipped."""
    section = root
    for step in path:
        field = section.model_fields.get(str(step))
        section = (_section_of(field.annotation) if field else None) or section
    return list(section.model_fields)


def _unknown_key(key: str, accepted: Sequence[str]) -> str:
    """Message for a key that the section doesn't have."""
    close = difflib.get_close_matches(key, accepted, n=1)
    return f"unknown key, did you mean {close[0]!r}?" if close else f"unknown key, known here: {', '.join(accepted)}"


_PHRASES: dict[str, str] = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "non-empty text",
    "string_too_long": "text of at most {max_length} characters",
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


def add_validation_errors(document: Document, root: type[BaseModel], errors: Sequence[Mapping[str, Any]]) -> None:
    """Turn pydantic's error dicts into problem lines of `document`.

    root: the class of the whole recipe.
    """
    expected_at: dict[KeyPath, tuple[Any, list[str]]] = {}
    located = [(_locate(document.data, error), error) for error in errors]
    for path, error in located:
        kind, context = error["type"], error.get("ctx", {})
        if "problems" in context:
            for steps, message in context["problems"]:
                document.report((*path, *steps), message)
        elif kind == "extra_forbidden":
            document.report(path, _unknown_key(str(path[-1]), _known_keys(root, path[:-1])))
        elif kind == "missing":
            document.report(path, "required key is missing")
        elif kind == "literal_error" and any(_section_was_meant(path, *other) for other in located):
            pass  # the other member of the union was meant, and has its own errors
        else:
            expected_at.setdefault(path, (error["input"], []))[1].append(_expectation(error))
    for path, (value, phrases) in expected_at.items():
        expected = " or ".join(dict.fromkeys(phrases))
        meant = _meant(value, expected)
        document.report(
            path, f"empty, expected {expected}" if value is None else f"{show_value(value)} is not {expected}{meant}"
        )


def _meant(value: Any, expected: str) -> str:
    """What a wrong value was probably meant to be, as far as that can be told: one of several, or a list."""
    if expected == _PHRASES["tuple_type"] and isinstance(value, str) and "," in value:
        return f": write [{value}]" if len(value) < 80 else ": write it in brackets"
    if not isinstance(value, str) or not value.isalpha() or not expected.startswith("one of "):
        return ""
    known = expected.removeprefix("one of ").partition(" or ")[0].split(", ")
    close = difflib.get_close_matches(value, known, n=1, cutoff=0.75)
    return f": did you mean {close[0]}?" if close else ""


def _section_was_meant(path: KeyPath, other: KeyPath, error: Mapping[str, Any]) -> bool:
    """Whether another error shows that a section was meant at `path`."""
    return other[: len(path)] == path and (other != path or "problems" in error.get("ctx", {}))


def _locate(data: Any, error: Mapping[str, Any]) -> KeyPath:
    """The path of the key that an error of pydantic is about.

    Names of union members are left out: they are not keys of the document.
    """
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
        values = context["expected"].replace(" or ", ", ").replace("'", "")
        return f"one of {values}" if ", " in values else values
    if error["type"] == "string_pattern_mismatch":
        return PATTERNS[context["pattern"]]
    phrase = _PHRASES.get(error["type"])
    return phrase.format(**context) if phrase else f"accepted: {error['msg']}"


def near_recipe(path: Path) -> str:
    """What to do about a recipe that does not exist: a near name beside it, or `requant init`."""
    try:
        there = sorted(name for name in os.listdir(path.parent) if name.endswith((".yaml", ".yml")))
    except OSError:
        there = []
    near = difflib.get_close_matches(path.name, there, n=1, cutoff=0.7)
    meant = f"did you mean {path.parent / near[0]}? Else " if near else ""
    return f"{meant}`requant init ADAPTER -o {path}` writes one"
