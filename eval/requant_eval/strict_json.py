"""JSON of strangers: parsed strictly and within limits, or refused by what is wrong with it.

`json` takes a key twice (the last one wins), NaN, numbers beyond a double and lone surrogates, raises RecursionError,
and hangs on a FIFO. Imports nothing heavy: all of requant reads JSON through it.
"""

from __future__ import annotations

import json
import math
import os
import re
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from requant_eval.regular_files import NotAFileError, open_regular

LARGEST = 100 * 10**6  # bytes of a file: parsed it takes ten times that
MOST = 8 * 10**6  # lists, objects and their members in one text: each takes up to 200 bytes and some microseconds
DEEPEST = 100  # lists and objects within each other: walks by recursion stay far from their limit
_DIGITS = 308  # of a whole number: more do not fit a double
_LONE_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BOM = "\ufeff"
_STRUCTURE = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|([\[{,])', re.DOTALL)  # a text, or what begins a value


class JsonError(ValueError):
    """The text is no JSON that is read here. The message says what was found, without the file's name.

    line: where, from 1, as far as that is known.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def load(file: Path, *, largest: int = LARGEST, constants: bool = False, bom: bool = False) -> Any:
    """The value in a file; `parse` says what is refused, and what constants and bom are.

    Raises JsonError, also for what is no regular file (a FIFO, a device) or has more than `largest` bytes; OSError
    where the file is missing or cannot be read.
    """
    return parse(read_bytes(file, largest), constants=constants, bom=bom)


def read_bytes(file: Path, largest: int = LARGEST) -> bytes:
    """The content of a regular file of at most `largest` bytes. Raises JsonError and OSError as `load` does."""
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > largest:
                raise JsonError(f"{size} bytes, expected at most {largest}")
            return stream.read(largest + 1)
    except NotAFileError as error:
        raise JsonError(str(error.strerror)) from error


def separated(text: str, separator: str) -> list[str]:
    """The JSON values of a text, as texts, where it has a sign between each two; else the whole text, as one."""
    found, at = list[str](), 0
    while at < len(text):
        try:
            _, end = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError):
            return [text]
        found.append(text[at:end])
        rest = text[end:].lstrip()
        if rest and not rest.startswith(separator):
            return [text]
        at = len(text) - len(rest[len(separator) :].lstrip())
    return found


def parse(text: bytes | str, *, constants: bool = False, bom: bool = False) -> Any:
    """The value of a JSON text.

    Raises JsonError for bytes that are no UTF-8 or begin with a byte order mark, a key that an object has twice,
    numbers that do not fit a double, lone surrogates, more than `DEEPEST` levels and more than `MOST` values.
    constants: whether NaN, Infinity and -Infinity are numbers, as in the config.json of some model families.
    bom: whether a byte order mark may stand in front, as editors write it.
    """
    if isinstance(text, bytes):
        text = _decoded(text)
    if text.startswith(_BOM):
        if not bom:
            raise JsonError("begins with a byte order mark: save it as UTF-8 without one", line=1)
        text = text[1:]
    begins = (found for found in _STRUCTURE.finditer(text) if found[1])
    if values_in(text) > MOST and next(islice(begins, MOST, None), None):
        raise JsonError(f"more than {MOST:,} values")
    try:
        value = _DECODERS[constants].decode(text)
    except RecursionError:
        raise JsonError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"not valid JSON: {error.msg} (column {error.colno})", line=error.lineno) from None
    if text.count("[") + text.count("{") > DEEPEST and depth(value, DEEPEST) > DEEPEST:
        raise JsonError(f"nested too deeply: more than {DEEPEST} levels")
    if "\\u" in text and _LONE_SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise JsonError("a text in it holds half a surrogate pair, which is no character") from None
    return value


def values_in(text: str | bytes) -> int:
    """No fewer than the lists, objects and their members in a JSON text: commas and brackets in strings count too."""
    return sum(text.count(c) for c in "[{,") if isinstance(text, str) else sum(text.count(c) for c in b"[{,")


def depth(value: Any, most: int) -> int:
    """Levels of lists and objects within each other, counted up to `most` + 1."""
    level: list[Any] = [value]
    for number in range(most + 1):
        outer = [v for v in level if isinstance(v, list | dict)]
        if not outer:
            return number
        level = [inner for v in outer for inner in (v.values() if isinstance(v, dict) else v)]
    return most + 1


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise JsonError(f"not UTF-8 text ({error.reason} at byte {error.start})", line) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise JsonError(f"{twice[:80]!r} is there twice: which one counts?")
    return found


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise JsonError(f"a number of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(f"{text[:80]} is beyond the range of numbers")
    return value


def _constant(text: str) -> NoReturn:
    raise JsonError(f"{text} is no JSON number")


_DECODERS = {
    constants: json.JSONDecoder(
        object_pairs_hook=_object,
        parse_int=_whole,
        parse_float=_number,
        parse_constant=float if constants else _constant,
    )
    for constants in (True, False)
}
