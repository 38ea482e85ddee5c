"""Strangers' text, made harmless for terminal, log, Markdown, front matter, XML.

Names of models, files, modules and sets, documents and answers, templates and hubs may hold anything. HTML and SVG are
escaped by markupsafe where they are made; what a terminal would obey is taken out for every destination, since files
are shown on terminals too.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from typing import Any

_OBEYED = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    r"\ufdd0-\ufdef\ufffe\uffff\U000e0000-\U000e0fff]"
)
"""Control characters (C0, C1), those that turn, join or hide text, halves of surrogates, what XML forbids."""
_BREAKS = re.compile(r"\s*[\n\r\t\v\f\x85\u2028\u2029]+\s*")
_CODE = re.compile(r"`[^`<>&|\\\n]+`")
_MARKUP = re.compile(r"\\(?=[!-/:-@\[-`{-~])|[`*|]|(?<!\w)_|_(?!\w)|~(?=~)|\](?=[(\[])|<(?=[A-Za-z/!?])|&(?=#?\w+;)")
_ENTITIES = {"<": "&lt;", "&": "&amp;"}
_BLOCK = re.compile(r"\[|#{1,6}(?=\s|$)|[>=]|[-+](?=\s|$)|-(?=-)|\d{1,9}[.)](?=\s|$)|~{3}")


def visible(text: str) -> str:
    r"""The text with what a terminal would obey as escapes (\x1b); line breaks and tabs stay."""
    return _OBEYED.sub(_spelled, text.replace("\r\n", "\n"))


def one_line(text: str) -> str:
    """As `visible`, each line break a blank: so that a name cannot begin a line of its own."""
    return visible(_BREAKS.sub(" ", text))


def everywhere(value: Any, *, whole: frozenset[str] = frozenset()) -> Any:
    """Plain data with every text in it on one line, keys too; line breaks stay in the texts of the keys `whole`."""
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, Mapping):
        return {
            one_line(key) if isinstance(key, str) else key: visible(item)
            if key in whole and isinstance(item, str)
            else everywhere(item, whole=whole)
            for key, item in value.items()
        }
    return [everywhere(item, whole=whole) for item in value] if isinstance(value, list | tuple) else value


def markdown(text: str) -> str:
    """A sentence as Markdown that shows it: no HTML, links, emphasis, tables; `names` in backticks stay code."""
    parts, at, text = [], 0, one_line(text)
    for code in _CODE.finditer(text):
        parts += [_escaped(text[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*parts, _escaped(text[at:])])


def markdown_block(text: str) -> str:
    """As `markdown`, where the text begins a line: no heading, list, quote, rule or name of a link."""
    shown = markdown(text).strip()
    begins = _BLOCK.match(shown)
    if begins is None:
        return shown
    at = begins.end() - 1 if begins[0][-1] in ".)" else 0
    return f"{shown[:at]}\\{shown[at:]}"


def fenced(text: str, language: str) -> str:
    """Preformatted text in a fence that it cannot close."""
    text = visible(text)
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def yaml(data: Mapping[str, Any]) -> str:
    r"""Plain data as YAML 1.2 in block style, keys in the given order; < is written as \x3C, since cards hold YAML."""
    from ruamel.yaml import YAML  # here, since every command imports this file
    from ruamel.yaml.representer import SafeRepresenter

    class Representer(SafeRepresenter):
        def represent_str(self, text: str) -> Any:
            odd = "<" in text or text != one_line(text)
            return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if odd else None)

    Representer.add_representer(str, Representer.represent_str)
    writer, stream = YAML(typ="safe", pure=True), io.StringIO()
    writer.Representer = Representer
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None there
    writer.width = 1 << 20
    writer.dump(data, stream)
    return visible(stream.getvalue().replace("<", "\\x3C"))  # both stand in double quotes, where escapes are read


def in_json(text: str) -> str:
    """JSON text with the characters that `visible` takes out as JSON's own escapes, which read back unchanged."""
    return _OBEYED.sub(lambda found: json.dumps(found[0])[1:-1], text)


def quoted(text: str) -> str:
    """A key or text in double quotes, as JSON and YAML read it, all on one line and in ASCII."""
    return json.dumps(text).replace("<", "\\u003c")


def _spelled(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _escaped(text: str) -> str:
    return _MARKUP.sub(lambda found: _ENTITIES.get(found[0], f"\\{found[0]}"), text)
