"""What a chat template leaves out of a conversation, found by marks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from requant.data.conversation import Conversation, Message

OPEN, CLOSE = "zqmark", "kramqz"  # letters only, so that JSON and trimming leave them as they are
THINKING = ("reasoning_content", "thinking", "reasoning")
Render = Callable[[list[Message], list[Any] | None], str]
Signature = tuple[Any, ...]


class TemplateFailure(Exception):
    """A chat template raised; the message is its own."""


def signature(given: Conversation) -> Signature:
    """What a template's path through a conversation depends on: roles, keys, calls, tools, thoughts."""
    messages = tuple(
        (m["role"], bool(m["content"]), "</think>" in (m["content"] or ""), len(m.get("tool_calls") or ()), *sorted(m))
        for m in given.messages
    )
    return (*messages, len(given.tools or ()))


def left_out(render: Render, given: Conversation) -> tuple[str, ...]:
    """What the text lacks, in words. render: (messages, tools) -> text; raises TemplateFailure."""
    marks: dict[str, str] = {}

    def mark(what: str) -> str:
        text = f"{OPEN}{len(marks)}{CLOSE}"
        marks[text] = what
        return text

    messages = [_marked(m, mark, last=m is given.messages[-1]) for m in given.messages]
    tools = [_marked_tool(t, mark) for t in given.tools] if given.tools else None
    try:
        text = render(messages, tools)
    except TemplateFailure:  # the template looks into a value
        return ()
    return tuple(dict.fromkeys(what for sign, what in marks.items() if sign not in text))


def _marked(message: Message, mark: Callable[[str], str], *, last: bool) -> Message:
    marked = dict(message)
    if content := message["content"]:
        thought, end, _ = content.rpartition("</think>")
        of = "the last answer" if last else "earlier answers"
        head = f"<think>{mark(f'the thinking of {of}')}{end}\n\n" if thought else ""
        marked["content"] = head + mark(f"messages of role {message['role']!r}")
    for key in THINKING:
        if isinstance(message.get(key), str) and message[key]:
            marked[key] = mark(f"{key} of {'the last answer' if last else 'earlier answers'}")
    if calls := message.get("tool_calls"):
        marked["tool_calls"] = [_marked_call(c, mark) for c in calls]
    return marked


def _marked_call(call: Any, mark: Callable[[str], str]) -> Any:
    if not isinstance(call, Mapping):
        return call
    function = call.get("function")
    inner = dict(function) if isinstance(function, Mapping) else dict(call)
    if isinstance(inner.get("name"), str):
        inner["name"] = mark("tool calls")
    return {**call, "function": inner} if isinstance(function, Mapping) else inner


def _marked_tool(tool: Any, mark: Callable[[str], str]) -> Any:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if isinstance(function, Mapping):
        return {**tool, "function": {**function, "name": mark("the list of tools")}}
    return {**tool, "name": mark("the list of tools")} if isinstance(tool, Mapping) else tool
