"""A conversation as rows hold it -> messages and tools as chat templates take them.

Known forms: OpenAI messages (role, content, tool_calls), ShareGPT turns (from, value), pairs ({user: ..., assistant:
...}), each as objects or as JSON text, with content as text or as a list of parts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from requant_eval.strict_json import JsonError, parse

Message = dict[str, Any]
ROLES = {
    "user": "user",
    "system": "system",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool_response": "tool",
    "function": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
"""Roles as people spell them, in any case -> the ones that templates know. Others reach the template as they are."""
_CALLS = ("function_call", "tool_call")
_PAIRS = {"input": "user", "output": "assistant"} | {
    k: ROLES[k] for k in ("system", "human", "user", "gpt", "assistant")
}
_SPELLINGS = {"role": ("role", "from"), "content": ("content", "value")}
_UNTRAINED = ("weight", "train", "training", "trainable", "loss")  # 0 or false: not learned
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


class RowError(ValueError):
    """A row that cannot be rendered; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages and tools for a chat template.

    learned: one flag a message: whether the model learns to produce it (the assistant's, unless a weight of 0 says no).
    """

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None = None
    learned: tuple[bool, ...] = ()

    def led_by(self, text: str | None) -> Conversation:
        """With a system message in front, unless there is one or `text` is empty."""
        if not text or (self.messages and self.messages[0]["role"] in ("system", "developer")):
            return self
        first: Message = {"role": "system", "content": text}
        return replace(self, messages=(first, *self.messages), learned=(False, *self.learned))

    def with_tools(self, tools: tuple[Any, ...] | None) -> Conversation:
        return replace(self, tools=tools or None)


def conversation(value: Any) -> Conversation | None:
    """The conversation in a cell of a chat column; None when it is null, empty or lacks an answer.

    Raises RowError when the value is no conversation.
    """
    turns = parsed(value)
    if turns is None or turns == []:
        return None
    if isinstance(turns, Mapping):
        return _wrapped(turns)
    if isinstance(turns, str) or not isinstance(turns, Sequence):
        raise RowError(f"expected a list of messages, found {_kind(turns)}")
    messages, learned = [], []
    for number, turn in enumerate(turns, 1):
        for message, learns in _messages(parsed(turn), number):
            messages.append(message)
            learned.append(learns)
    if any(m["content"] is None for m in messages):
        return None
    return Conversation(messages=tuple(messages), learned=tuple(learned))


def _wrapped(value: Mapping[str, Any]) -> Conversation | None:
    """The conversation in an object: with system text and tools beside its messages, or as lists by key."""
    inner = next((value[k] for k in ("messages", "conversations", "conversation") if k in value), None)
    if inner is not None:
        found = conversation(inner)
        return (
            None
            if found is None
            else found.led_by(text_of(value.get("system"))).with_tools(tools_of(value.get("tools")))
        )
    if value and all(isinstance(v, list) for v in value.values()):
        return conversation([dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)])
    return conversation([value])


def prompt_and_answer(prompt: Any, answer: Any, history: Iterable[tuple[str, str]] = ()) -> Conversation | None:
    """A prompt and its answer, each text or messages; None when one of them is null."""
    asked, answered = _side(prompt, "user"), _side(answer, "assistant")
    if asked is None or answered is None:
        return None
    before = tuple(
        _message(role, text) for pair in history for role, text in zip(("user", "assistant"), pair, strict=True)
    )
    learned = (*(m["role"] == "assistant" for m in before), *(False for _ in asked.messages), *answered.learned)
    return Conversation(messages=(*before, *asked.messages, *answered.messages), learned=learned)


def tools_of(value: Any) -> tuple[Any, ...] | None:
    """The tools in a cell, objects or JSON text; None when there are none. Raises RowError."""
    found = parsed(value)
    if not found:
        return None
    if isinstance(found, Mapping):
        found = [found]
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise RowError(f"tools: expected a list of functions, found {_kind(found)}")
    tools = [parsed(tool) for tool in found]
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise RowError(f"tools: expected functions as objects, found {_kind(tool)}")
    return tuple(t if "function" in t or "type" in t else {"type": "function", "function": t} for t in tools)


def text_of(value: Any) -> str | None:
    """Text in a cell: a string, a number, a list of strings or of parts; None when null. Raises RowError."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and math.isnan(value):
        return None  # as tables write what is missing
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, Mapping):
        return _part(value)
    if isinstance(value, Sequence):
        joint = "\n" if all(isinstance(v, str) for v in value) else ""
        return joint.join(v if isinstance(v, str) else _part(v) for v in value if v is not None)
    raise RowError(f"expected text, found {_kind(value)}")


def is_messages(value: Any) -> bool:
    """Whether a cell holds a list of messages, as objects or as JSON text of known roles."""
    if isinstance(value, str):
        try:
            turns = parsed(value)
        except RowError:
            return False
        return isinstance(turns, list) and bool(turns) and all(_is_known_message(turn) for turn in turns)
    if not isinstance(value, Sequence) or not value:
        return False
    try:
        first = parsed(value[0])
    except RowError:
        return False
    return isinstance(first, Mapping) and any(k in first for k in _SPELLINGS["role"])


def _is_known_message(turn: Any) -> bool:
    if not isinstance(turn, Mapping):
        return False
    role = next((turn[k] for k in _SPELLINGS["role"] if k in turn), None)
    return isinstance(role, str) and role.lower() in ROLES and any(k in turn for k in _SPELLINGS["content"])


def _side(value: Any, role: str) -> Conversation | None:
    """A prompt or an answer. An answer of JSON text is text, whatever it looks like."""
    if is_messages(value) and not (role == "assistant" and isinstance(value, str)):
        return conversation(value)
    text = text_of(value)
    if text is None:
        return None
    return Conversation(messages=(_message(role, text),), learned=(role == "assistant",))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def parsed(value: Any) -> Any:
    """A value that may be written as JSON text."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value if not isinstance(value, str) or value.strip() else None
    try:
        return parse(value, constants=True)
    except JsonError as error:
        hint = (
            ": it looks like Python's repr; write it with json.dumps"
            if value.lstrip()[1:].lstrip("{ ").startswith("'")
            else ""
        )
        raise RowError(f"its text begins like JSON and is none ({error}){hint}") from error


def _messages(turn: Any, number: int) -> list[tuple[Message, bool]]:
    """The messages of one turn, and whether each is learned."""
    if not isinstance(turn, Mapping):
        raise RowError(f"message {number} is {_kind(turn)}, expected an object with role and content")
    role = next((turn[k] for k in _SPELLINGS["role"] if k in turn), None)
    if role is None and turn and all(k in _PAIRS for k in turn):
        pairs = [(_PAIRS[k], _content(v, number)) for k, v in turn.items()]
        return [({"role": r, "content": c}, r == "assistant") for r, c in pairs]
    if not isinstance(role, str):
        raise RowError(f"message {number} has {', '.join(map(str, turn)) or 'nothing'}, expected role and content")
    media = next((k for k in _MEDIA if turn.get(k)), None)
    if media is not None:
        raise RowError(f"message {number} holds {media}: only text is calibrated and scored; leave such rows out")
    used = {k for keys in _SPELLINGS.values() for k in keys} | set(_UNTRAINED)
    others = {k: v for k, v in turn.items() if k not in used and v is not None}
    if not any(k in turn for k in _SPELLINGS["content"]) and not any(
        k in others for k in ("tool_calls", "function_call")
    ):
        raise RowError(f"message {number} has {', '.join(map(str, turn))}, expected its text as content")
    said = next((turn[k] for k in _SPELLINGS["content"] if k in turn), None)
    known = ROLES.get(role.lower(), role)
    if known == "tool" and isinstance(said, Mapping) and "text" not in said:
        said = json.dumps(said, ensure_ascii=False)  # a result that is an object
    learns = known == "assistant" and not any(turn.get(k) in (0, "0", "false") for k in _UNTRAINED if k in turn)
    return [({"role": known, **_calls(role.lower(), _content(said, number), others)}, learns)]


def _calls(role: str, content: str | None, others: Message) -> Message:
    """Content and tool calls of a message, in the form of OpenAI's `tool_calls`."""
    calls = others.pop("function_call", None)
    if role in _CALLS and content:
        try:
            calls = parse(content, constants=True)
        except JsonError:
            calls = None  # a call in a notation of its own is what the assistant wrote
    made = [_call(c) for c in (calls if isinstance(calls, list) else [calls])]
    if calls and all(made):
        others["tool_calls"] = made
        content = "" if role in _CALLS else content
    elif others.get("tool_calls"):
        found = parsed(others["tool_calls"])
        others["tool_calls"] = [_call(c) or c for c in (found if isinstance(found, list) else [found])]
    if content is None and (others.get("tool_calls") or any(k in others for k in ("reasoning_content", "thinking"))):
        content = ""
    return {"content": content, **others}


def _call(call: Any) -> Message | None:
    """A call as OpenAI writes it, from one that is flat; None when it is none."""
    if not isinstance(call, Mapping):
        return None
    if isinstance(call.get("function"), Mapping):
        return dict(call)
    if not isinstance(call.get("name"), str):
        return None
    arguments: Any = next((call[k] for k in ("arguments", "parameters") if call.get(k) is not None), {})
    outer = {k: v for k, v in call.items() if k not in ("name", "arguments", "parameters", "type")}
    return {**outer, "type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _content(value: Any, number: int) -> str | None:
    try:
        return text_of(value)
    except RowError as error:
        raise RowError(f"message {number}: {error}") from error


def _part(part: Any) -> str:
    """The text of one part of a message's content."""
    if not isinstance(part, Mapping):
        raise RowError(f"expected text, found {_kind(part)}")
    kind = part.get("type", "text" if "text" in part else None)
    text = part.get("text")
    if kind in ("text", "input_text", "output_text") and isinstance(text, str):
        return text
    if kind is None:
        raise RowError(f"expected text, found an object with {', '.join(map(str, part)) or 'nothing'}")
    raise RowError(f"holds a part of type {kind!r}: only text is calibrated and scored; leave such rows out")


def _kind(value: Any) -> str:
    names = {str: "text", dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
