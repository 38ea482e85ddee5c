"""Safetensors files, changed at random: header, offsets, shapes, names, values."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

Header = dict[str, Any]
PATTERNS = {  # dtype -> a number that is none, an infinite one
    "F32": (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"), "BF16": (b"\xc0\x7f", b"\x80\x7f"),
    "F16": (b"\x00\x7e", b"\x00\x7c"),
}  # fmt: skip


def split(data: bytes) -> tuple[Header, bytes]:
    """Header and body of a whole file."""
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: Any, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def changed_tensors(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A changed file and what was done to it."""
    kind = rng.choice(tuple(CHANGES))
    made, told = CHANGES[kind](data, rng)
    return made, f"{kind} {told}"[:120]


def changed_values(data: bytes, rng: Random) -> tuple[bytes, str]:
    """A file with a whole header whose values differ: what only a digest or a second look at the numbers can find."""
    return rng.choice((_body_flip, _not_a_number, _swap))(data, rng)


def _head_flip(data: bytes, rng: Random) -> tuple[bytes, str]:
    return _flip(data, rng, 0, struct.unpack("<Q", data[:8])[0] + 8)


def _body_flip(data: bytes, rng: Random) -> tuple[bytes, str]:
    return _flip(data, rng, struct.unpack("<Q", data[:8])[0] + 8, len(data))


def _flip(data: bytes, rng: Random, first: int, last: int) -> tuple[bytes, str]:
    made, times = bytearray(data), rng.choice((1, 4, 30))
    for _ in range(times):
        made[rng.randrange(first, last)] ^= 1 << rng.randrange(8)
    return bytes(made), f"{times} bits"


def _length(data: bytes, rng: Random) -> tuple[bytes, str]:
    size = rng.choice((0, 1, 7, 2**63, 2**64 - 1, 10**8, len(data), len(data) - 8, 100 * 2**20))
    return struct.pack("<Q", size) + data[8:], str(size)


def _not_a_number(data: bytes, rng: Random) -> tuple[bytes, str]:
    header, body = split(data)
    name = rng.choice([n for n in header if n != "__metadata__"])
    first, last = header[name]["data_offsets"]
    pattern = rng.choice(PATTERNS.get(header[name]["dtype"], (b"\xff", b"\x00")))
    if last - first < len(pattern):
        return data, f"{name} is empty"
    place = first + rng.randrange((last - first) // len(pattern)) * len(pattern)
    return join(header, body[:place] + pattern + body[place + len(pattern) :]), name


def _swap(data: bytes, rng: Random) -> tuple[bytes, str]:
    header, body = split(data)
    names = [n for n in header if n != "__metadata__"]
    one = rng.choice(names)
    other = rng.choice([n for n in names if header[n]["shape"] == header[one]["shape"]])
    header[one], header[other] = header[other], header[one]
    return join(header, body), f"{one} {other}"


def _entry(change: Callable[[Header, str, Random], str]) -> Callable[[bytes, Random], tuple[bytes, str]]:
    """A change of one tensor's entry in the header."""

    def made(data: bytes, rng: Random) -> tuple[bytes, str]:
        header, body = split(data)
        name = rng.choice([n for n in header if n != "__metadata__"])
        told = change(header, name, rng)
        return join(header, body), f"{name} {told}"

    return made


def _field(key: str, *values: Any) -> Callable[[Header, str, Random], str]:
    def change(header: Header, name: str, rng: Random) -> str:
        header[name][key] = rng.choice(values)
        return str(header[name][key])[:30]

    return change


def _shape(convert: Callable[[int], Any]) -> Callable[[Header, str, Random], str]:
    def change(header: Header, name: str, rng: Random) -> str:
        header[name]["shape"] = [convert(n) for n in header[name]["shape"]]
        return str(header[name]["shape"])

    return change


def _turned(header: Header, name: str, rng: Random) -> str:
    shape = header[name]["shape"]
    header[name]["shape"] = rng.choice((shape[::-1], [1, *shape], [*shape, 1], [sum(shape)], shape[1:]))
    return str(header[name]["shape"])


def _shared(header: Header, name: str, rng: Random) -> str:
    other = rng.choice([n for n in header if n != "__metadata__"])
    header[name] = copy.deepcopy(header[other])
    return f"has the bytes of {other}"


def _renamed(header: Header, name: str, rng: Random) -> str:
    header[name + rng.choice(("x", "\n", "\x00", "\u202e", ".0", "\x1b[2J"))] = header.pop(name)
    return "renamed"


def _dropped(header: Header, name: str, rng: Random) -> str:
    del header[name]
    return "dropped"


def _added(header: Header, name: str, rng: Random) -> str:
    extra = rng.choice(
        (
            "evil",
            "../../x",
            "",
            "\x1b[2J",
            "a" * 10_000,
            "model.layers.99.self_attn.q_proj.weight",
            f"{name}.absmax",
            f"{name}.x",
        )
    )
    header[extra] = copy.deepcopy(header[name])
    return f"also {extra[:30]!r}"


def _emptied(header: Header, name: str, rng: Random) -> str:
    header[name] |= {"shape": [0, *header[name]["shape"][1:]], "data_offsets": [0, 0]}
    return "has no values"


def _twice(data: bytes, rng: Random) -> tuple[bytes, str]:
    header, body = split(data)
    names = [n for n in header if n != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[other])}}}"
    return join(text.encode(), body), name


def _metadata(data: bytes, rng: Random) -> tuple[bytes, str]:
    header, body = split(data)
    header["__metadata__"] = rng.choice(
        (None, 1, [], {"format": 1}, {"format": "tf"}, "x", {"a": "b" * 100_000}, {"a": None})
    )
    return join(header, body), str(header["__metadata__"])[:30]


def _moved(data: bytes, rng: Random) -> tuple[bytes, str]:
    """Every tensor 64 bytes later: a gap that nothing describes."""
    header, body = split(data)
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [n + 64 for n in entry["data_offsets"]]
    return join(header, b"\0" * 64 + body), ""


def _replaced(data: bytes, rng: Random) -> tuple[bytes, str]:
    body = split(data)[1]
    many = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}
    made: Any = rng.choice((b"[" * 50_000, b'{"a":' * 50_000, {}, [1], many, b"", b"null", b'{"x": 1}'))
    return join(made, body), "another header"


CHANGES: dict[str, Callable[[bytes, Random], tuple[bytes, str]]] = {
    "cut": lambda data, rng: (data[: rng.randrange(len(data))], ""),
    "head flip": _head_flip,
    "body flip": _body_flip,
    "length": _length,
    "value": _not_a_number,
    "swap": _swap,
    "dtype": _entry(
        _field("dtype", "F16", "F64", "I8", "F4", "", None, 3, [], "F8_E4M3", "BOOL", "U8", "C64", "bf16", {})
    ),
    "shape": _entry(
        _field("shape", [], [1], None, 5, "ab", {"a": 1}, [[1]], [None], [1.5], ["64", "64"], [True, True])
    ),
    "huge shape": _entry(_field("shape", [2**62], [10**400], [1] * 1000, [0, 2**70], [2**40, 2**40])),
    "negative shape": _entry(_shape(lambda n: -n)),
    "float shape": _entry(_shape(float)),
    "text shape": _entry(_shape(str)),
    "turned": _entry(_turned),
    "offsets": _entry(
        _field(
            "data_offsets",
            [0],
            [0, 1, 2],
            None,
            ["a", "b"],
            [5, 0],
            [-8, 0],
            [0, 10**30],
            [1.0, 2.0],
            [True, False],
            {},
        )
    ),
    "shared": _entry(_shared),
    "renamed": _entry(_renamed),
    "dropped": _entry(_dropped),
    "added": _entry(_added),
    "emptied": _entry(_emptied),
    "entry": _entry(lambda header, name, rng: str(header.update({name: rng.choice((None, 1, [], "x", {}, [1, 2]))}))),
    "twice": _twice,
    "metadata": _metadata,
    "moved": _moved,
    "gap": lambda data, rng: (join(split(data)[0], b"\0" * 64 + split(data)[1]), ""),
    "tail": lambda data, rng: (data + b"junk" * rng.choice((1, 1000)), ""),
    "header": _replaced,
    "random": lambda data, rng: (rng.randbytes(rng.choice((0, 4, 8, 100, 10_000))), ""),
}
