"""A tokenizer's chat template: conversation -> text, and the parts that the model learns.

Templates are programs of strangers: what they raise, rewrite or leave out is told with the row.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from requant.data.conversation import Conversation, Message, RowError

DATE = datetime.date(2024, 7, 26)
"""The day that templates write where none is asked for: the one that Llama 3's templates fall back to."""
SYSTEM_JOINED = "the system text was joined to the first user turn, since the chat template takes no system role"
AS_SYSTEM = "role 'developer' was rendered as 'system', which the chat template knows"
ARGUMENTS = "arguments of tool calls were given as objects, since the chat template takes no text"
_MARK = "\ue000"  # of the private use area: no template writes it
Spans = list[tuple[int, int]]


def freeze_date(tokenizer: Any, date: datetime.date = DATE) -> Any:
    """The tokenizer, its chat templates given `date` where they ask for today's (`strftime_now`).

    Texts and their digests then do not change overnight.
    """
    given = tokenizer.chat_template
    if isinstance(given, dict):
        tokenizer.chat_template = {name: _dated(template, date) for name, template in given.items()}
    elif isinstance(given, str):
        tokenizer.chat_template = _dated(given, date)
    return tokenizer


def _dated(template: str, date: datetime.date) -> str:
    """The template behind a macro that replaces the function `strftime_now` by the directives' values on `date`."""
    if "strftime_now" not in template:
        return template
    directives = [f"%{flag}{letter}" for flag in ("-", "") for letter in "aAbBcdDeFhHIjmMpSuUVwWxXyY"]
    filters = "".join(f" | replace({d!r}, {date.strftime(d)!r})" for d in directives)
    value = f"{{{{ format{filters} | replace('%%', '%') }}}}"
    return f"{{%- macro strftime_now(format) -%}}{value}{{%- endmacro %}}\n{template}"


def asks_for_date(tokenizer: Any) -> bool:
    """Whether a chat template writes today's date."""
    return "strftime_now" in json.dumps(tokenizer.chat_template or "")


def writes_bos(tokenizer: Any) -> bool:
    """Whether the chat template begins with BOS."""
    if not tokenizer.chat_template or not tokenizer.bos_token:
        return False
    try:
        return _apply(tokenizer, [{"role": "user", "content": "a"}], None).startswith(tokenizer.bos_token)
    except TemplateFailure:
        return False


def render(tokenizer: Any, given: Conversation) -> tuple[str, Conversation, list[str]]:
    """(text by the tokenizer's template, the conversation as it was rendered, what had to be changed or is left out).

    Raises RowError when the template refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise RowError("the tokenizer has no chat template: use format text, or a tokenizer that has one")
    refusal: Exception | None = None
    for changed, notes in _variants(given):
        try:
            text = _apply(tokenizer, changed.messages, changed.tools)
        except TemplateFailure as error:
            refusal = refusal or error
            continue
        lost = [m["role"] for m in changed.messages if _is_lost(m, text)]
        if "developer" in lost:
            continue
        calls = [_name(c) for m in changed.messages for c in m.get("tool_calls") or () if _name(c) not in text]
        tools = [_name(t) for t in changed.tools or () if _name(t) not in text]
        dropped = [
            *(f"messages of role {role!r}" for role in dict.fromkeys(lost)),
            *(["tool calls"] if calls else []),
            *(["the list of tools"] if tools else []),
        ]
        return text, changed, [*notes, *(f"the chat template leaves out {what}" for what in dropped)]
    raise RowError(f"the chat template refuses it: {refusal}; {_advice(given.messages)}") from refusal


class TemplateFailure(Exception):
    """A chat template raised; the message is its own."""


def _apply(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None, *, ask: bool = False) -> str:
    """The rendered text. ask: with the beginning of an answer (generation prompt)."""
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=ask,
        )
    except Exception as error:  # a template is a program: it can raise anything
        raise TemplateFailure(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    return text


def _variants(given: Conversation) -> Iterator[tuple[Conversation, list[str]]]:
    """The conversation as it is, then in forms that stricter templates take, each with what was changed."""
    yield given, []
    together, notes = given, list[str]()
    for note, change in _CHANGES.items():
        if (alone := change(given)) is not None:
            yield alone, [note]
        if (added := change(together)) is not None:
            together, notes = added, [*notes, note]
    if len(notes) > 1:
        yield together, notes


def _developer_as_system(given: Conversation) -> Conversation | None:
    if all(m["role"] != "developer" for m in given.messages):
        return None
    changed = tuple(m | {"role": "system"} if m["role"] == "developer" else m for m in given.messages)
    return replace(given, messages=changed)


def _parsed_arguments(given: Conversation) -> Conversation | None:
    """Arguments of tool calls that are JSON text, as objects."""

    def parsed(call: Any) -> Any:
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        try:
            arguments = json.loads(function["arguments"])
        except (KeyError, TypeError, ValueError):
            return call
        return call | (
            {"function": {**function, "arguments": arguments}} if "function" in call else {"arguments": arguments}
        )

    messages = tuple(
        m | {"tool_calls": [parsed(c) for c in m["tool_calls"]]} if m.get("tool_calls") else m for m in given.messages
    )
    return replace(given, messages=messages) if messages != given.messages else None


def _joined_system(given: Conversation) -> Conversation | None:
    """The system message as the beginning of the user turn that follows it."""
    if len(given.messages) < 2:
        return None
    first, second, *rest = given.messages
    if first["role"] not in ("system", "developer") or second["role"] != "user":
        return None
    joined = second | {"content": f"{first['content']}\n\n{second['content']}"}
    return replace(given, messages=(joined, *rest), learned=given.learned[1:])


_CHANGES: dict[str, Callable[[Conversation], Conversation | None]] = {
    AS_SYSTEM: _developer_as_system,
    ARGUMENTS: _parsed_arguments,
    SYSTEM_JOINED: _joined_system,
}
"""What is said -> the change, for templates that refuse a conversation as it is; None where it changes nothing."""


def _is_lost(message: Message, text: str) -> bool:
    """Whether the text lacks a message's content; an answer's earlier thinking may be left out."""
    content = message["content"] or ""
    if message["role"] == "assistant":
        content = content.rpartition("</think>")[2]
    content = content.strip()
    return (
        bool(content) and content not in text and json.dumps(content)[1:-1] not in text and not _reflowed(content, text)
    )


def _reflowed(content: str, text: str) -> bool:
    """Whether the content is there in other white space or as JSON of its own."""
    return "".join(content.split()) in "".join(text.split()) or json.dumps(content, ensure_ascii=False)[1:-1] in text


def _name(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""


def _advice(messages: Sequence[Message]) -> str:
    """What to do about a conversation that a template refuses."""
    roles = [m["role"] for m in messages]
    twice = next((i for i in range(1, len(roles)) if roles[i] == roles[i - 1]), None)
    if twice is not None:
        return f"turns {twice} and {twice + 1} are both {roles[twice]!r}: join them into one"
    if roles and roles[0] == "assistant":
        return "the first turn is the assistant's: begin with the user's, or leave that turn out"
    return "change the row, give the adapter the template it was trained with, or use format text on ready-made text"


def learned_spans(tokenizer: Any, text: str, given: Conversation) -> Spans:
    """Parts of `text` that the model learns to write: from the beginning of an answer to the end of its turn.

    given: as it was rendered. Where the template rewrites earlier turns, only the last answer is located.
    Raises RowError when even that cannot be.
    """
    answers = [i for i, learns in enumerate(given.learned) if learns]
    if not answers:
        return []
    spans = [_span(tokenizer, text, given, i) for i in answers]
    located = [span for span in spans if span is not None]
    if len(located) == len(answers) and all(a[1] <= b[0] for a, b in pairwise(located)):
        return located
    if spans[-1] is None:
        raise RowError("the chat template rewrites what came before the last answer: its part cannot be located")
    return [spans[-1]]


def _span(tokenizer: Any, text: str, given: Conversation, index: int) -> tuple[int, int] | None:
    """Where message `index` stands in `text`; None when the template writes its beginning otherwise."""
    asked, answered = given.messages[:index], given.messages[: index + 1]
    try:
        after = _apply(tokenizer, answered, given.tools)
        before = (
            _apply(tokenizer, asked, given.tools, ask=True) if asked else _opening(tokenizer, answered[0], given.tools)
        )
        prompt = _apply(tokenizer, asked, given.tools).rstrip() if asked else before
    except TemplateFailure:
        return None
    if not (text.startswith(after.rstrip()) and text.startswith(prompt)):
        return None
    # The generation prompt may open a block that the answer leaves out.
    start = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text)))
    return (start, len(after)) if len(prompt) <= start < len(after) else None


def _opening(tokenizer: Any, first: Message, tools: Sequence[Any] | None) -> str:
    """What the template writes before the first message's content."""
    return _apply(tokenizer, [first | {"content": _MARK}], tools).partition(_MARK)[0]
