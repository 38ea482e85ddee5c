"""What may not leave in messages, logs and files: secrets and places on this machine.

Secrets are tokens of a hub and the values of `${env:VAR}` in recipes. `masked` takes them out of everything that is
shown, `shared` also shortens paths in what is written into a run directory and may be handed on.
"""

from __future__ import annotations

import html
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import quote

from requant_eval.regular_files import read_bytes

MASK = "***"
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
SHORTEST = 4  # characters; to replace fewer would mangle words and numbers, and they keep nothing secret
LONG = 8  # characters from which a value is replaced inside of words too
_ORDINARY = re.compile(
    r"[-+]?[\d.,]+ ?(%|[KMG]i?B)?|\d{4}-\d\d-\d\d|[A-Za-z]{1,7}|cuda:\d+|b?float\d+|in-domain|validation|evaluation|"
    r"transformers|gptqmodel|original|dequantized|activation|documents|completion|conversations?|instruction|response",
    re.ASCII,
)
"""Values that are no secrets: short words and those of recipes, numbers, sizes, days, devices, dtypes."""
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{8,}|(?<=\bBearer )[^\s'\",)]+|(?<=\bBasic )(?=\S*[\dA-Z])[\w+/=-]{8,}"
    r"|(?<=://)[^\s/@:]+:[^\s/@]+(?=@)"
)
"""What looks like a token wherever it comes from: a hub's, one in a header that a server echoes, one in an address."""

_values: dict[str, str] = {}  # value -> what stands for it
_roots: set[str] = set()


def hide(variable: str, value: str) -> None:
    """Take the value of an environment variable for a secret, unless it is too ordinary to be one."""
    ordinary = _ORDINARY.fullmatch(value) and not (value.isdigit() and len(value) >= LONG)
    if len(value) >= SHORTEST and not ordinary:
        _values[value] = f"${{env:{variable}}}"


def add_root(path: Path) -> None:
    """Take a directory for a place on this machine, which `shared` leaves out."""
    for spelled in (os.path.abspath(path), os.path.realpath(path)):
        if len(Path(spelled).parts) > 1:
            _roots.add(spelled)


def masked(text: str) -> str:
    """The text with `${env:VAR}` in place of the variable's value, and *** in place of tokens."""
    known = _values | dict.fromkeys(_tokens(), MASK)
    if known:
        pattern, names = _pattern(tuple(sorted(known.items())))
        text = pattern.sub(lambda found: names[found[0]], text)
    return _SHAPES.sub(MASK, text)


def shared(text: str) -> str:
    """As `masked`; of each path below a place on this machine only the last part."""
    roots = {root for root in (os.path.expanduser("~"), tempfile.gettempdir(), os.getcwd()) if len(root) > 1}
    pattern = _paths(tuple(sorted(_roots | roots, key=len, reverse=True)))
    home = os.path.expanduser("~")
    name = {root: "~" if root == home else Path(root).name for root in (*_roots, *roots)}
    return pattern.sub(lambda found: found["last"] or name[found["root"]], masked(text))


def everywhere(value: Any, change: Callable[[str], str]) -> Any:
    """Plain data with `change` applied to every text in it, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(k) if isinstance(k, str) else k: everywhere(v, change) for k, v in value.items()}
    return [everywhere(item, change) for item in value] if isinstance(value, list | tuple) else value


class MaskedStream:
    """A text stream that writes everything masked; otherwise the stream itself."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(masked(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def masked_stream(stream: IO[str]) -> IO[str]:
    """The stream, masked once."""
    return stream if isinstance(stream, MaskedStream) else cast("IO[str]", MaskedStream(stream))


def _tokens() -> list[str]:
    """The hub tokens that this process could send: of the environment, and the one that the hub's client stores."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface"
    )
    stored = _stored(os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token"))
    found = [os.environ.get(name, "").strip() for name in TOKENS] + [stored]
    return [token for token in found if len(token) >= SHORTEST]


@lru_cache(maxsize=8)
def _stored(file: str) -> str:
    try:
        return read_bytes(file, 10_000).decode().strip()[:1000]
    except (OSError, ValueError):
        return ""


@lru_cache(maxsize=32)
def _pattern(known: tuple[tuple[str, str], ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """One pattern for all spellings of the values, the longest first, and what stands for each spelling."""
    names = {form: name for value, name in known for form in _spellings(value)}
    parts = [
        re.escape(form) if len(form) >= LONG else rf"(?<!\w){re.escape(form)}(?!\w)"
        for form in sorted(names, key=len, reverse=True)
    ]
    return re.compile("|".join(parts)), names


def _spellings(value: str) -> set[str]:
    """The value as it is, in a message's quotes, in JSON, HTML and addresses, on one line."""
    forms = {value, " ".join(value.split()), repr(value)[1:-1], html.escape(value), quote(value), quote(value, safe="")}
    forms |= {json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
    forms |= {line.strip() for line in value.splitlines() if len(line.strip()) >= LONG}
    return {form for form in forms if len(form) >= SHORTEST}


@lru_cache(maxsize=32)
def _paths(roots: tuple[str, ...]) -> re.Pattern[str]:
    root, part = "|".join(map(re.escape, roots)), r"[^\s/'\"`,;:()<>\[\]]"
    begins = r"(?:(?<![\w.~/-])|(?<=file://))"
    return re.compile(rf"{begins}(?P<root>{root})(?:/+(?:{part}+/+)*(?P<last>{part}*)|(?![\w.-]))")
