"""A tokenizer's chat template: conversation -> text, and the parts that the model learns.

Templates are programs of strangers: what they raise, rewrite or leave out is told with the row.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from requant.data import template_call, template_losses
from requant.data.conversation import Conversation, Message, RowError
from requant.data.template_losses import TemplateFailure
from requant.errors import InputError
from requant.runtime.guarded_process import LimitError, call_guarded
from requant_eval.strict_json import JsonError, parse

DATE = datetime.date(2024, 7, 26)
"""The day that templates write where none is asked for: the one that Llama 3's templates fall back to."""
SYSTEM_JOINED = "the system text was joined to the first user turn, since the chat template takes no system role"
AS_SYSTEM = "role 'developer' was rendered as 'system', which the chat template knows"
ARGUMENTS = "arguments of tool calls were given as text, since the chat template takes no objects"
IDS = "tool calls got ids of nine letters and digits, which the chat template asks for"
_MARK = template_losses.OPEN
Spans = list[tuple[int, int]]


def freeze_date(tokenizer: Any, date: datetime.date = DATE, *, where: Path | str = "the tokenizer") -> Any:
    """The tokenizer, its chat templates given `date` where they ask for today's (`strftime_now`).

    Texts and their digests then do not change overnight. where: the file of the templates, for errors.
    Raises InputError for a named template that is no text.
    """
    given = tokenizer.chat_template
    if isinstance(given, dict):
        wrong = [name for name, template in given.items() if not isinstance(template, str)]
        if wrong:
            raise InputError(
                f"{where}: chat_template: {wrong[0]!r:.80} is {given[wrong[0]]!r:.60}, expected the text of a template"
            )
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
    """Whether the chat template begins with BOS; a token that begins every turn is a mark of turns."""
    if not tokenizer.chat_template or not tokenizer.bos_token:
        return False
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    try:
        text = call_guarded(partial(template_call.apply, tokenizer, turns, None))
    except (TemplateFailure, LimitError):
        return False
    return text.startswith(tokenizer.bos_token) and text.count(tokenizer.bos_token) == 1


def render(
    tokenizer: Any, given: Conversation, known: dict[template_losses.Signature, tuple[str, ...]] | None = None
) -> tuple[str, Conversation, list[str]]:
    """(text by the tokenizer's template, the conversation as it was rendered, what had to be changed or is left out).

    known: what is left out of conversations of the same form, kept between calls. Raises RowError when the template
    refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise RowError("the tokenizer has no chat template: use format text, or a tokenizer that has one")
    known = {} if known is None else known
    refusal = TemplateFailure("nothing was tried")
    for changed, notes in _variants(given):
        try:
            text = template_call.apply(tokenizer, changed.messages, changed.tools)
        except TemplateFailure as error:
            refusal = error
            continue
        form = template_losses.signature(changed)
        if form not in known:
            known[form] = template_losses.left_out(partial(template_call.apply, tokenizer), changed)
        if "messages of role 'developer'" in known[form]:
            refusal = TemplateFailure("role 'developer' is left out")
            continue
        parts = [template_call.PARTS] if template_call.takes_only_parts(tokenizer) else []
        lost = [f"the chat template leaves out {what}" for what in known[form]]
        return text, changed, [*notes, *parts, *lost]
    raise RowError(f"the chat template refuses it: {refusal}; {_advice(given.messages)}") from refusal


def opened(tokenizer: Any, given: Conversation) -> str:
    """The conversation by the tokenizer's template, with the turn of an answer opened.

    Raises RowError when the template refuses the conversation, also in the forms that `render` tries.
    """
    refusal = TemplateFailure("nothing was tried")
    for changed, _ in _variants(given):
        try:
            return template_call.apply(tokenizer, changed.messages, changed.tools, ask=True)
        except TemplateFailure as error:
            refusal = error
    raise RowError(f"the chat template refuses it: {refusal}") from refusal


def _variants(given: Conversation) -> Iterator[tuple[Conversation, list[str]]]:
    """The conversation, then in forms that stricter templates take, each with what was changed.

    Arguments of tool calls are objects first, as templates expect that write them as JSON.
    """
    given = _with_arguments(given, _parsed) or given
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


def _with_arguments(given: Conversation, change: Callable[[Any], Any]) -> Conversation | None:
    """With the arguments of tool calls changed; None where that changes nothing."""

    def changed(call: Any) -> Any:
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or "arguments" not in inner:
            return call
        function = {**inner, "arguments": change(inner["arguments"])}
        return {**call, "function": function} if "function" in call else function

    messages = tuple(
        m | {"tool_calls": [changed(c) for c in m["tool_calls"]]} if m.get("tool_calls") else m for m in given.messages
    )
    return replace(given, messages=messages) if messages != given.messages else None


def _parsed(arguments: Any) -> Any:
    """Arguments written as JSON text, as an object."""
    try:
        found = parse(arguments, constants=True) if isinstance(arguments, str) else arguments
    except JsonError:
        return arguments
    return found if isinstance(found, dict) else arguments


def _arguments_as_text(given: Conversation) -> Conversation | None:
    def written(arguments: Any) -> Any:
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)

    return _with_arguments(given, written)


def _short_ids(given: Conversation) -> Conversation | None:
    """Tool calls and their results numbered alike, with ids of nine letters and digits."""
    if not any(m.get("tool_calls") or m["role"] == "tool" for m in given.messages):
        return None
    ids: dict[Any, str] = {}
    waiting: list[str] = []
    messages = []
    for m in given.messages:
        if calls := m.get("tool_calls"):
            numbered = []
            for call in calls:
                made = f"call{len(ids):05d}"
                ids[call.get("id", made) if isinstance(call, Mapping) else made] = made
                waiting.append(made)
                numbered.append({**call, "id": made} if isinstance(call, Mapping) else call)
            m = m | {"tool_calls": numbered}
        elif m["role"] == "tool":
            answered = ids.get(m.get("tool_call_id")) or (waiting[0] if waiting else None)
            if answered in waiting:
                waiting.remove(answered)
            m = m | {"tool_call_id": answered} if answered else m
        messages.append(m)
    return replace(given, messages=tuple(messages))


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
    ARGUMENTS: _arguments_as_text,
    IDS: _short_ids,
    SYSTEM_JOINED: _joined_system,
}
"""What is said -> the change, for templates that refuse a conversation as it is; None where it changes nothing."""


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
    last = spans[-1] or _marked_span(tokenizer, text, given, answers[-1])
    if last is None:
        raise RowError("the chat template rewrites what came before the last answer: its part cannot be located")
    return [last]


def _marked_span(tokenizer: Any, text: str, given: Conversation, index: int) -> tuple[int, int] | None:
    """Where an answer stands: the text differs there when a mark takes the place of the answer's content."""
    marked = [*given.messages]
    marked[index] = marked[index] | {"content": _MARK}
    try:
        other = template_call.apply(tokenizer, marked, given.tools)
    except TemplateFailure:
        return None
    if other.count(_MARK) != 1:
        return None
    start, rest = other.index(_MARK), other.partition(_MARK)[2]
    if text[:start] != other[:start] or not text.endswith(rest):
        return None
    stop = len(text) - len(rest)
    special = [*getattr(tokenizer, "all_special_tokens", ()), *tokenizer.get_added_vocab()]
    end = max((t for t in special if rest.startswith(t)), key=len, default="")  # of the turn
    return (start, stop + len(end)) if start < stop else None


def _span(tokenizer: Any, text: str, given: Conversation, index: int) -> tuple[int, int] | None:
    """Where message `index` stands in `text`; None when the template writes its beginning otherwise."""
    asked, answered = given.messages[:index], given.messages[: index + 1]
    try:
        after = template_call.apply(tokenizer, answered, given.tools)
        before = (
            template_call.apply(tokenizer, asked, given.tools, ask=True)
            if asked
            else _opening(tokenizer, answered[0], given.tools)
        )
        prompt = template_call.apply(tokenizer, asked, given.tools).rstrip() if asked else before
    except TemplateFailure:
        return None
    if not (text.startswith(after.rstrip()) and text.startswith(prompt)):
        return None
    # The generation prompt may open a block that the answer leaves out.
    start = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text)))
    return (start, len(after)) if len(prompt) <= start < len(after) else None


def _opening(tokenizer: Any, first: Message, tools: Sequence[Any] | None) -> str:
    """What the template writes before the first message's content."""
    return template_call.apply(tokenizer, [first | {"content": _MARK}], tools).partition(_MARK)[0]
