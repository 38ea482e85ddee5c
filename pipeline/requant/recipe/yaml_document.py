"""YAML 1.2 document that records the line of each key, for messages.

Includes `--set` overrides and `${env:VAR}`. Independent of the recipe's keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from requant import outgoing
from requant.errors import RecipeError
from requant.recipe.override_values import is_key, plain_data, split_setting, steps_of
from requant.recipe.yaml_nodes import compose

KeyPath = tuple[str | int, ...]

# YAML 1.2 core schema (section 10.3.2): nothing else is anything but text.
_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_DIGITS = 40  # of a whole number; what is longer stays text, which no key with a number takes

_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Document:
    """A YAML mapping as plain dicts, lists and scalars, with the origin of each key.

    The origin is a line of the file or a `--set`. written: of each text with `${env:VAR}`, that text and what it stands
    for.
    `data` may be changed by `override` and `interpolate`; what is wrong is collected, not raised.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.data: Any = {}
        self.written: dict[KeyPath, tuple[str, str]] = {}
        self._marks: dict[KeyPath, tuple[int, str]] = {(): (1, f"{source}:1")}
        self._problems: list[tuple[int, str]] = []

    @property
    def problems(self) -> list[str]:
        """Every problem so far, in the order of the file, overrides last."""
        return [text for _, text in sorted(self._problems, key=lambda problem: problem[0])]

    @property
    def places(self) -> dict[KeyPath, str]:
        """Key -> `file:line`, or the `--set` that gave it."""
        return {path: label for path, (_, label) in self._marks.items()}

    def report(self, path: KeyPath, message: str, line: int | None = None) -> None:
        """Add the problem `where: key.path: message`, at `line` or at the nearest key."""
        nearest = next(path[:depth] for depth in range(len(path), -1, -1) if path[:depth] in self._marks)
        order, label = self._marks[nearest] if line is None else (line, f"{self.source}:{line}")
        key = show_path(path)
        prefix = label if not key or label in _given_at(key) else f"{label}: {key}"
        self._problems.append((order, f"{prefix}: {message}"))

    def mark(self, path: KeyPath, node: Node) -> None:
        """Record the line (from 1) on which the key or item at `path` starts."""
        line = node.start_mark.line + 1
        self._marks[path] = (line, f"{self.source}:{line}")

    def override(self, setting: str) -> None:
        """Apply one `--set key.path=value`: YAML; a key that contains a dot is in double quotes."""
        try:
            key, text = split_setting(setting)
            value = value_of(text, f"--set {key}")
        except RecipeError as error:
            self._problems += [(_LAST, problem) for problem in error.problems]
            return
        self._assign_at(key, value, f"--set {key}")

    def override_with(self, key: str, value: Any) -> None:
        """Apply one override of a Python caller: the key as `--set` spells it, and plain data."""
        if not is_key(key):
            self._problems.append((_LAST, f"overrides: {key!r}: expected a key such as quantize.bits"))
            return
        self._assign_at(key, plain_data(value), f"overrides: {key}")

    def prefer_override(self, section: str, one: str, other: str) -> None:
        """Of two keys that exclude each other, drop the file's where an override gives the other a value."""
        held = self.data.get(section) if isinstance(self.data, dict) else None
        given = {key for key in (one, other) if self._marks.get((section, key), (0, ""))[0] == _LAST}
        for key, replaced in ((one, other), (other, one)):
            if isinstance(held, dict) and given == {key} and held[key] is not None:
                held.pop(replaced, None)

    def _assign_at(self, key: str, value: Any, label: str) -> None:
        """Set `value` at a key path in text; a step that contains a dot is in double quotes."""
        message = self._assign(steps_of(key), value, label)
        if message:
            self._problems.append((_LAST, f"{label}: {message}"))

    def _assign(self, steps: list[str], value: Any, label: str) -> str:
        """Set `value` at the path `steps`, creating sections.

        Returns what is wrong, or an empty text.
        """
        holder, path = self.data, KeyPath()
        for depth, step in enumerate(steps):
            key: str | int = step
            if isinstance(holder, list):
                if not step.isdecimal() or int(step) >= len(holder):
                    count = f"{len(holder)} item{'s' if len(holder) != 1 else ''}"
                    return f"{show_path(path)} has {count}, numbered from 0: there is no item {step!r}"
                key = int(step)
            elif not isinstance(holder, dict):
                return f"{show_path(path)} is {show_value(holder)}, not a section: it has no key {step!r}"
            path = (*path, key)
            if depth == len(steps) - 1:
                self._forget(path)
                holder[key] = value
                self._marks[path] = (_LAST, label)
            elif isinstance(holder, dict) and holder.get(step) is None:
                holder[step] = {}
                self._marks[path] = (_LAST, label)
            holder = holder[key]
        return ""

    def _forget(self, path: KeyPath) -> None:
        """Drop the lines of everything below `path`: an override replaces it."""
        self._marks = {marked: mark for marked, mark in self._marks.items() if marked[: len(path)] != path}

    def interpolate(self, environment: Mapping[str, str] = os.environ) -> None:
        """Replace `${env:VAR}` and `${env:VAR:-default}` in every text value.

        The variables' values are hidden from messages and files. Any other `${` is a problem.
        """
        self.data = self._interpolated(self.data, (), environment)

    def _interpolated(self, value: Any, path: KeyPath, environment: Mapping[str, str]) -> Any:
        if isinstance(value, dict):
            for key in value:
                self._check_characters(key, (*path, key))
            return {key: self._interpolated(item, (*path, key), environment) for key, item in value.items()}
        if isinstance(value, list):
            return [self._interpolated(item, (*path, i), environment) for i, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        if "${" not in value:
            self._check_characters(value, path)
            return value

        def replace(match: re.Match[str]) -> str:
            name, default = match[1], match[2]
            if name not in environment and default is None:
                self.report(path, f"environment variable {name} is not set: set it or write ${{env:{name}:-default}}")
            if name in environment:
                outgoing.hide(name, environment[name])
            return environment.get(name, default or "")

        text = _ENV.sub(replace, value)
        self.written[path] = (value, text)
        if "${" in _ENV.sub("", value):
            self.report(path, f"{show_value(value)}: only ${{env:VAR}} and ${{env:VAR:-default}} are replaced")
        elif "${" in text:
            self.report(path, f"{show_value(value)}: the variable's value holds ${{ itself, which is not replaced")
        self._check_characters(text, path)
        return text

    def _check_characters(self, text: object, path: KeyPath) -> None:
        """Report what no name of a file, column or module holds: control characters and halves of characters."""
        wrong = _UNPRINTABLE.search(text) if isinstance(text, str) else None
        if wrong:
            found = f"a control character or half of a character (U+{ord(wrong[0]):04X})"
            self.report(path, f"holds {found}: leave it out")


class Places(dict[KeyPath, str]):
    """Where each key of a recipe is set. Recipes with the same values are equal wherever they are set.

    written: as in `Document`.
    """

    def __init__(self, document: Document | None = None) -> None:
        super().__init__(document.places if document else {})
        self.written = document.written if document else {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Places)

    __hash__ = None

    def of(self, path: KeyPath) -> str:
        """`file:line: key` of a key or the nearest one that holds it; the key alone where nothing is known."""
        label = next((self[path[:depth]] for depth in range(len(path), 0, -1) if path[:depth] in self), "")
        key = show_path(path)
        return key if not label else label if label in _given_at(key) else f"{label}: {key}"


def _given_at(key: str) -> tuple[str, ...]:
    """The labels of an override of this key, which name the key themselves."""
    return f"--set {key}", f"overrides: {key}"


_LAST = 1 << 62  # overrides sort after every line of the file


def read(text: str, source: str) -> Document:
    """Parse one YAML 1.2 mapping.

    Duplicate keys and foreign tags become problems of the returned document.

    Raises:
        RecipeError: the text is not YAML, is empty, or is not a mapping.
    """
    root = compose(text, source)
    if root is None or (isinstance(root, ScalarNode) and _scalar(root) is None):
        raise RecipeError(f"{source}: empty file: `requant init ADAPTER` writes a recipe to start from")
    if not isinstance(root, MappingNode):
        kind = show_value(_scalar(root)) if isinstance(root, ScalarNode) else "a list"
        raise RecipeError(f"{source}:1: not a mapping: expected `key: value` lines, got {kind}")
    document = Document(source)
    document.data = _plain(root, (), document, ())
    return document


def value_of(text: str, label: str) -> Any:
    """The YAML value of a `--set`; raises RecipeError for what is no YAML."""
    try:
        node = compose(text, label)
    except RecipeError as error:
        message = error.problems[0].split("not valid YAML: ", 1)[-1]
        raise RecipeError(f"{label}: {show_value(text)} is not valid YAML: {message}") from error
    if node is None:
        return None
    holder = Document(label)
    value = _plain(node, (), holder, ())
    if holder.problems:
        raise RecipeError([f"{label}: {problem.split(': ', 1)[1]}" for problem in holder.problems])
    return value


def _plain(node: Node, path: KeyPath, document: Document, parents: tuple[Node, ...]) -> Any:
    """One node -> dict, list or scalar; marks lines and reports duplicates in `document`."""
    if any(node is parent for parent in parents):
        document.report(path, "an alias may not be inside the value that it names")
        return None
    if not (node.tag or "").startswith("tag:yaml.org,2002:"):
        document.report(path, f"unknown tag {node.tag}: leave it out")
    parents = (*parents, node)
    if isinstance(node, MappingNode):
        return _mapping(node, path, document, parents)
    if isinstance(node, SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            document.mark((*path, index), item)
            items.append(_plain(item, (*path, index), document, parents))
        return items
    return _scalar(node) if isinstance(node, ScalarNode) else None


def _mapping(node: MappingNode, path: KeyPath, document: Document, parents: tuple[Node, ...]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = _scalar(key_node) if isinstance(key_node, ScalarNode) else None
        if not isinstance(key, str):
            shown = key_node.value if isinstance(key_node, ScalarNode) else "(a list or mapping)"
            document.mark((*path, shown), key_node)
            document.report((*path, shown), "this key is not text: put it in quotes")
        elif key in result:
            message = f"duplicate key, first given on line {lines[key]}: keep one of them"
            document.report((*path, key), message, line=line)
        else:
            document.mark((*path, key), key_node)
            lines[key] = line
            result[key] = _plain(value_node, (*path, key), document, parents)
    return result


def _scalar(node: ScalarNode) -> Any:
    """Core-schema value of a scalar: quoted text stays text; `no`, `off` and dates are text."""
    text: str = node.value
    if node.style or node.tag == "tag:yaml.org,2002:str":
        return text
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text) and len(text) <= _DIGITS:
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text.replace(".", "") if "n" in text.lower() else text)
    return text


def show_path(path: KeyPath) -> str:
    """A key path as `--set` spells it: `quantize.overrides."*.down_proj".bits`."""
    steps = [_UNPRINTABLE.sub("?", str(step)) for step in path]
    return ".".join(f'"{step}"' if "." in step else step for step in steps)


def show_value(value: Any) -> str:
    """A short YAML-like spelling of a value for a message."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list | tuple):
        return "a list" if value else "an empty list"
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    value = outgoing.masked(value) if isinstance(value, str) else value
    text = ascii(value) if isinstance(value, str) and _UNPRINTABLE.search(value) else repr(value)
    return text if len(text) <= 80 else f"{text[:76]}...'"
