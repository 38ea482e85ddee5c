"""Bytes, JSON and YAML, changed at random: every function draws from its `Random` alone."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from random import Random
from typing import Any

Path = tuple[Any, ...]
DEEP = (900, 5_000, 100_000)  # levels of nesting
HUGE = 5_000  # digits: more than int() reads
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 0.5, 2**31, 2**63, 10**12, 10**400, -(10**30), 1e308, float("nan"), float("inf"),
    -float("inf"), "", " ", "x", "-1", "null", "a" * 100_000, "\x00", "\x1b[31mred\x1b[0m", "\x9b2J",
    "\u202e\u200b\u2066",
    "\ud800", "é\u0301😀", "two\nlines", "---\n- a: b", "../../../etc/passwd", "/dev/zero", "/etc/passwd", "~", ".",
    "bfloat17",
    "1e999", "${env:HF_TOKEN}", "<script>alert(1)</script>", "[x](javascript:alert(1))", "| a | b |",
    "%s%n{0}{{ 7*7 }}",
    [], {}, [[]], [None], {"a": 1}, {"": None}, ["x"] * 1000, [0, "a", None],
)  # fmt: skip


def paths(value: Any, here: Path = ()) -> Iterator[Path]:
    """Paths to every value inside, of lists the first forty."""
    if here:
        yield here
    if isinstance(value, dict):
        for key, below in value.items():
            yield from paths(below, (*here, key))
    elif isinstance(value, list):
        for index, below in enumerate(value[:40]):
            yield from paths(below, (*here, index))


def at(value: Any, path: Path) -> Any:
    for step in path:
        value = value[step]
    return value


def changed_tree(document: Any, rng: Random, *, depth: int = 9, strange: tuple[Any, ...] = STRANGE) -> tuple[Any, str]:
    """A copy with one to three values deleted, replaced, wrapped, renamed or of another type, and what was done."""
    made, told = copy.deepcopy(document), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = [p for p in paths(made) if len(p) <= depth]
        if not found:
            break
        path = rng.choice(found)
        told.append(f"{'.'.join(map(str, path))[:60]} {_change(at(made, path[:-1]), path[-1], rng, strange)}")
    return made, "; ".join(told)


def _change(parent: Any, key: Any, rng: Random, strange: tuple[Any, ...]) -> str:
    kind = rng.choice(("delete", "value", "value", "value", "value", "wrap", "rename", "type", "near"))
    old = parent[key]
    if kind == "delete":
        del parent[key]
    elif kind == "wrap":
        parent[key] = rng.choice(([old], {"x": old}, [old, old]))
    elif kind == "rename" and isinstance(parent, dict):
        parent[f"{key}{rng.choice(('x', 'é', chr(0), ' ', chr(27)))}"] = parent.pop(key)
    elif kind == "type":
        parent[key] = rng.choice((1, [old])) if isinstance(old, str) else str(old)
    elif kind == "near" and isinstance(old, int | float) and not isinstance(old, bool):
        parent[key] = rng.choice((old + 1, old - 1, -old, old * 2, old + 0.5, old * 10**9))
    else:
        parent[key] = copy.deepcopy(rng.choice(strange))
        return f"= {str(parent[key])[:24]!r} ({type(parent[key]).__name__})"
    return kind


def to_json(document: Any) -> bytes:
    """JSON as Python writes it: also NaN, and lone surrogates as escapes."""
    return json.dumps(document).encode()


def changed_bytes(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A text file cut, flipped, nested, doubled or of another encoding, and what was done."""
    kind = rng.choice(tuple(TEXT_CHANGES))
    return TEXT_CHANGES[kind](data, rng), kind


def _flipped(data: bytes, rng: Random) -> bytes:
    made = bytearray(data or b" ")
    for _ in range(rng.choice((1, 3, 20))):
        made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    return bytes(made)


def _inserted(data: bytes, rng: Random, what: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + what + data[place:]


def _doubled_key(data: bytes, rng: Random) -> bytes:
    """One `"key": value` line or pair twice."""
    found = list(re.finditer(rb'"[\w.]+": ?[^,{}\[\]]+,', data))
    if not found:
        return data + data
    match = rng.choice(found)
    return data[: match.start()] + match[0] + data[match.start() :]


def _nested(rng: Random) -> bytes:
    n = rng.choice(DEEP)
    return rng.choice((b"[" * n, b"[" * n + b"]" * n, b'{"a":' * n + b"1" + b"}" * n, b"- " * n + b"a"))


def _numbered(data: bytes, rng: Random) -> bytes:
    return re.sub(rb"\d+", b"9" * HUGE, data, count=rng.choice((1, 3)))


TEXT_CHANGES = {
    "cut": lambda data, rng: data[: rng.randrange(len(data) + 1)],
    "flip": _flipped,
    "insert": lambda data, rng: _inserted(data, rng, rng.randbytes(rng.choice((1, 5, 50)))),
    "nul": lambda data, rng: _inserted(data, rng, b"\x00" * 10),
    "control": lambda data, rng: _inserted(
        data, rng, rng.choice((b"\x1b[2J", b"\xc2\x9b", "\u202e".encode(), b"\r", b"\x07"))
    ),
    "deep": lambda data, rng: _nested(rng),
    "empty": lambda data, rng: rng.choice((b"", b" ", b"\n", b"null", b"{}", b"[]", b"0", b'"x"')),
    "mark": lambda data, rng: b"\xef\xbb\xbf" + data,
    "utf16": lambda data, rng: data.decode("utf-8", "replace").encode("utf-16"),
    "twice": lambda data, rng: data + data,
    "key twice": _doubled_key,
    "list": lambda data, rng: b"[" + data + b"]",
    "number": _numbered,
    "junk": lambda data, rng: rng.randbytes(rng.choice((10, 1000, 100_000))),
    "surrogate": lambda data, rng: re.sub(rb'"[a-z_]+"', b'"\\\\ud800"', data, count=1),
    "not utf8": lambda data, rng: _inserted(data, rng, b"\xff\xfe\x80"),
}


def changed_json(document: Any, rng: Random, *, depth: int = 9, trees: float = 0.75) -> tuple[bytes, str]:
    """A JSON file with other values (a share of `trees`) or other bytes, and what was done."""
    if rng.random() < trees:
        made, told = changed_tree(document, rng, depth=depth)
        return to_json(made), told
    return changed_bytes(json.dumps(document, indent=1).encode(), rng)
