"""Checks of an answer that need no judge: pure functions on its text, without a model.

    ended             the last token is one of the model's stop tokens, within those that an answer may have
    thought_closed    a thought that was opened, by the prompt or the answer, is closed
    tool_call         every call is JSON, names a tool that there is, and its arguments fit that tool's schema
    same_script       the answer's letters are of the prompt's writing system
    same_language     the answer's commonest words are of the prompt's language
    no_loop           the answer does not end in a loop

Each is True or False, or None where it does not apply to an answer. `CHECKS` has their words. `ended` is decided where
tokens are known: a text may spell a stop token.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from requant_eval.metrics.languages import COMMON, language
from requant_eval.strict_json import JsonError, parse, separated

CHECKS = {
    "ended": "ends by itself",
    "thought_closed": "closes its thought",
    "tool_call": "its tool calls are valid",
    "same_script": "is written in the prompt's script",
    "same_language": "is written in the prompt's language",
    "no_loop": "does not repeat itself at the end",
}
"""Check -> its words, after "the answer"."""
RULES = {
    "ended": "the last token is a stop token of the checkpoint, within the tokens that an answer may have",
    "thought_closed": "an opened <think>, or the like, is closed; judged where the prompt or the answer opens one",
    "tool_call": "calls are JSON, name a tool of the row, and required keys, types and enums of its schema are kept; "
    "judged where the row has tools and its own answer, or this one, makes a call",
    "same_script": "most letters are of a script (Latin, Cyrillic, Han, ...) of the prompt or of the row's own answer; "
    "two languages of one script look the same to it",
    "same_language": "the commonest words are those of the language of the prompt, or of the row's own answer; judged "
    f"where the languages of both are sure, of {', '.join(COMMON)}",
    "no_loop": "the answer does not end in 1 to 40 words four times in a row, 12 words at least, or in 40 blanks",
}
"""Check -> what exactly passes."""
THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("[THINK]", "[/THINK]"),
)
FEWEST_LETTERS = 8  # of an answer whose script is judged
SHARE = 0.2  # of a text's letters, from which a script is one of the text's
LONGEST_LOOP, FEWEST_TIMES, FEWEST_UNITS = 40, 4, 12
UNREAD = object()
"""A call in a notation that is not read."""
MOST_BLANKS = 40  # at the end of an answer, from which they are a loop
_RULE = set("|-:=+")  # of a table's rules, which repeat themselves
_UNIT = re.compile(r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|([^\w\s])\1*")
_IN_TAGS = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_NAMED = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\S*?)?\[ARGS\]")
_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict,
    "null": type(None),
}  # fmt: skip
_NO_SCRIPT = {"MODIFIER", "MATHEMATICAL", "FEMININE", "MASCULINE", "MICRO", "SCRIPT", "DOUBLE-STRUCK", "BLACK-LETTER"}
_SCRIPTS = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}


def thought_closed(text: str, prompt: str) -> bool | None:
    """Whether each thought is closed before the text ends; None where none was opened.

    prompt: its end may open one, as templates of reasoning models do.
    """
    found = []
    for begin, end in THOUGHTS:
        inside = prompt.rstrip().endswith(begin)
        if not inside and begin not in text:
            continue
        for mark in re.findall(f"{re.escape(begin)}|{re.escape(end)}", text):
            inside = mark == begin
        found.append(not inside)
    return all(found) if found else None


def tool_call(text: str, tools: Sequence[Any], *, expected: bool) -> bool | None:
    """Whether the text's calls are valid; None where there are no tools, or no call is made and none expected.

    tools: of the row, as OpenAI writes them (name and parameters, a JSON Schema). expected: whether the row's own
    answer makes a call. Read are Hermes' <tool_call> tags, Mistral's [TOOL_CALLS], and an answer that is JSON alone,
    one value or several with ";" between them;
    what stands in tags and does not begin as JSON is another notation, and not judged where no call is expected.
    """
    if not tools:
        return None
    known = {name: schema for tool in tools if (named := _named(tool)) for name, schema in [named]}
    calls = list(_calls(text, known.keys()))
    if not calls or UNREAD in calls:
        return False if expected else None
    return all(_is_valid(call, known) for call in calls)


def after_thought(text: str, prompt: str) -> str:
    """The text without a thought that the prompt has opened; "" where it never ends."""
    for begin, end in THOUGHTS:
        if prompt.rstrip().endswith(begin):
            return text.partition(end)[2]
    return text


def reads_calls(text: str) -> bool:
    """Whether the text makes a call in a notation that `tool_call` reads."""
    return any(_name_and_arguments(call) is not None for call in _calls(text))


def scripts(text: str) -> Counter[str]:
    """Letters by writing system: Latin, Cyrillic, Han, Hangul, Kana, Arabic, Devanagari and what else Unicode names.

    Where a tenth of Han and Kana together is Kana, Han counts as Kana: Japanese is written in both.
    """
    found: Counter[str] = Counter()
    for letter, times in Counter(text).items():
        if unicodedata.category(letter)[0] == "L" and (name := _script(letter)):
            found[name] += times
    if found["Kana"] and 10 * found["Kana"] >= found["Han"] + found["Kana"]:
        found["Kana"] += found.pop("Han", 0)
    return +found


def same_script(text: str, prompt: str, own: str = "") -> bool | None:
    """Whether most of the text's letters are of a script of the prompt, or of the row's own answer (translations).

    A script is one of a text's from a fifth of its letters. None for fewer than 8 letters, or a prompt without any.
    """
    written = scripts(text)
    allowed = {name for of in (scripts(prompt), scripts(own)) for name, n in of.items() if n >= SHARE * of.total()}
    if written.total() < FEWEST_LETTERS or not allowed:
        return None
    return written.most_common(1)[0][0] in allowed


def same_language(text: str, prompt: str, own: str = "") -> bool | None:
    """Whether the text is in the language of the prompt, or of the row's own answer (translations).

    None where its language is not sure, or theirs.
    """
    written, allowed = language(text), {language(prompt), language(own)} - {None}
    return None if written is None or not allowed else written in allowed


def no_loop(text: str) -> bool:
    """Whether the text does not end in a loop: 1 to 40 units four times in a row, 12 units in all at least.

    A unit is a word, a run of one punctuation mark, or a character of a script without blanks. The last time may be
    cut off. 40 blanks or line ends are a loop too.
    """
    if len(text) - len(text.rstrip()) >= MOST_BLANKS:
        return False
    units = [found[0] for found in _UNIT.finditer(text)]
    ends = (units, units[:-1])  # its last word may be cut off, too
    return not any(_loops(end, length) for end in ends for length in range(1, LONGEST_LOOP + 1))


def _loops(units: Sequence[str], length: int) -> bool:
    least, covered = max(FEWEST_TIMES * length, FEWEST_UNITS), length
    while covered < len(units) and units[-1 - covered + length] == units[-1 - covered]:
        covered += 1
        if covered >= least:
            return not all(set(unit) <= _RULE for unit in units[-length:])
    return False


def _script(letter: str) -> str | None:
    """The writing system of a letter by its name in Unicode; None of letters that are symbols."""
    words = unicodedata.name(letter, "").split()
    if words and words[0] in ("FULLWIDTH", "HALFWIDTH"):
        words = words[1:]
    if not words or words[0] in _NO_SCRIPT:
        return None
    return _SCRIPTS.get(words[0], words[0].capitalize())


def _calls(text: str, known: Collection[str] = ()) -> Iterator[Any]:
    """Each call that the text makes, parsed; None for one that is not JSON, UNREAD for one that does not try to be."""
    for begin, end in THOUGHTS:  # what is only thought of is not called
        text = _without(text, begin, end)
    if tagged := _IN_TAGS.findall(text):
        yield from (_json(part) if part.lstrip().startswith(("{", "[")) else UNREAD for part in tagged)
        return
    if "[TOOL_CALLS]" in text:
        for part in text.split("[TOOL_CALLS]")[1:]:
            if named := _NAMED.match(part):
                yield {"name": named[1], "arguments": _json(part[named.end() :])}
            else:
                yield from _listed(_json(part))
        return
    alone = text.strip().removeprefix("<|python_tag|>").strip()
    head, _, rest = alone.partition("\n")
    alone = rest[:-3].strip() if head.strip() in ("```", "```json") and rest.endswith("```") else alone
    if alone.startswith(("{", "[")):
        parsed = (call for part in separated(alone, ";") for call in _listed(_json(part)))
        found = (call for call in parsed if isinstance(call, dict) and "name" in call)
        yield from (call for call in found if call["name"] in known or "arguments" in call or "parameters" in call)


def _without(text: str, begin: str, end: str) -> str:
    """The text without what stands between two marks, and without them."""
    kept, at = [], 0
    while (start := text.find(begin, at)) >= 0 and (stop := text.find(end, start + len(begin))) >= 0:
        kept.append(text[at:start])
        at = stop + len(end)
    return "".join([*kept, text[at:]])


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) and value else [value]


def _json(text: str) -> Any:
    try:
        return parse(text.strip())
    except JsonError:
        return None


def _named(tool: Any) -> tuple[str, Mapping[str, Any]] | None:
    """(name, JSON Schema of the arguments) of a tool."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    schema = function.get("parameters")
    return function["name"], schema if isinstance(schema, Mapping) else {}


def _name_and_arguments(call: Any) -> tuple[str, Mapping[str, Any]] | None:
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", call.get("parameters", {}))
    arguments = _json(arguments) if isinstance(arguments, str) else arguments
    return (call["name"], arguments) if isinstance(arguments, Mapping) else None


def _is_valid(call: Any, known: Mapping[str, Mapping[str, Any]]) -> bool:
    found = _name_and_arguments(call)
    if found is None or found[0] not in known:
        return False
    return fits({"type": "object", **known[found[0]]}, found[1])


def fits(schema: Any, value: Any) -> bool:
    """Whether a value keeps `type`, `enum`, `required`, `properties`, `additionalProperties: false` and `items`.

    Other keywords of JSON Schema are not looked at.
    """
    if not isinstance(schema, Mapping):
        return True
    types = schema["type"] if isinstance(schema.get("type"), list) else [schema.get("type", "any")]
    if types and not any(_is_a(value, name) for name in types):
        return False
    if isinstance(schema.get("enum"), list) and not any(
        value == one and _kind(value) == _kind(one) for one in schema["enum"]
    ):
        return False
    if isinstance(value, list):
        return all(fits(schema.get("items"), item) for item in value)
    if not isinstance(value, Mapping):
        return True
    named = schema.get("properties")
    properties = named if isinstance(named, Mapping) else {}
    required = schema["required"] if isinstance(schema.get("required"), list) else []
    if any(key not in value for key in required if isinstance(key, str)):
        return False
    if schema.get("additionalProperties") is False and any(key not in properties for key in value):
        return False
    return all(fits(properties.get(key), item) for key, item in value.items())


def _kind(value: Any) -> type:
    """The type, but for numbers: 1 is 1.0, and not true."""
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def _is_a(value: Any, name: Any) -> bool:
    if not isinstance(name, str) or name not in _TYPES:
        return True
    if isinstance(value, bool):
        return name == "boolean"
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[name])
