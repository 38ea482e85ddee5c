"""YAML text -> nodes, within limits: what is no recipe is told before it is built.

Ten lines in which each names the one before ten times stand for more values than memory holds.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent
from ruamel.yaml.nodes import Node
from ruamel.yaml.reader import ReaderError

from requant.errors import RecipeError

LARGEST = 10**6  # characters
MOST = 20_000  # values, an alias counted as all that it stands for
DEEPEST = 40  # sections in each other; a recipe has six


def compose(text: str, source: str) -> Node | None:
    """The root node of one YAML document, None of an empty one.

    Raises RecipeError, with `source` and the line: not YAML, or beyond the limits of this file.
    """
    if len(text) > LARGEST:
        raise RecipeError(f"{source}: {len(text):,} characters: a recipe has at most {LARGEST:,}")
    with suppress(YAMLError, ValueError):  # `compose` comes to the same place, and knows better what is wrong there
        _check_size(text, source)
    try:
        node: Node | None = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        hint = ": put quotes around text that begins with *" if "alias" in str(error.problem) else ""
        raise RecipeError(f"{source}:{line}: not valid YAML: {error.problem or error.context}{hint}") from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{source}:{line}: not valid YAML: {error.reason}") from error
    except (YAMLError, ValueError) as error:  # ValueError: a directive with a version of other than numbers
        raise RecipeError(f"{source}: not valid YAML: {error}") from error
    return node


def _check_size(text: str, source: str) -> None:
    """Count values and levels as they are read; nothing of them is kept."""
    sizes: dict[str, int] = {}  # anchor -> values that it stands for
    inside: list[tuple[str | None, int]] = []  # anchor of each open section, values before it
    count = 0
    event: Any
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, AliasEvent):
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, ScalarEvent | CollectionStartEvent):
            count += 1
            if isinstance(event, CollectionStartEvent):
                inside.append((event.anchor, count - 1))
            elif event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, CollectionEndEvent):
            anchor, before = inside.pop()
            if anchor:
                sizes[anchor] = count - before
        place = f"{source}:{event.start_mark.line + 1}"
        if count > MOST:
            raise RecipeError(f"{place}: more than {MOST:,} values, aliases (*name) counted: no recipe has so many")
        if len(inside) > DEEPEST:
            raise RecipeError(f"{place}: more than {DEEPEST} sections or lists in each other: no recipe is so deep")
