"""One call of a tokenizer's chat template, with content in the form that it takes.

Templates of models that see images loop over the parts of a message's content; some of them take nothing else, and
write no word of content that is text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from requant.data.conversation import Message
from requant.data.template_losses import CLOSE, OPEN, TemplateFailure
from requant.errors import one_line

PARTS = "content was given as a list of parts, since the chat template takes only those"
MOST_ADDED, MOST_TIMES = 50_000, 10  # characters that a template may add, and times that it may write what it is given
_MARK = OPEN + CLOSE


def apply(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None, *, ask: bool = False) -> str:
    """The rendered text. ask: with the beginning of an answer (generation prompt). Raises TemplateFailure."""
    _refuse_unnamed(tokenizer, tools)
    given = [_in_parts(m) for m in messages] if takes_only_parts(tokenizer) else [dict(m) for m in messages]
    return _call(tokenizer, given, tools, ask=ask)


def takes_only_parts(tokenizer: Any) -> bool:
    """Whether content must be a list of parts: found by a mark that is lost as text and written as a part."""
    template = tokenizer.chat_template
    known = getattr(tokenizer, "content_parts", None)  # (template, the answer), since asking takes two calls
    if known is None or known[0] != template:
        message = {"role": "user", "content": _MARK}
        known = (template, not _writes(tokenizer, message) and _writes(tokenizer, _in_parts(message)))
        tokenizer.content_parts = known
    return bool(known[1])


def _writes(tokenizer: Any, message: Message) -> bool:
    """Whether a conversation of this message alone has its mark."""
    with suppress(TemplateFailure):
        return _MARK in _call(tokenizer, [message], None, ask=False)
    return False


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else dict(message)


def _refuse_unnamed(tokenizer: Any, tools: Sequence[Any] | None) -> None:
    """Raise TemplateFailure where the tokenizer has several templates and none is for this conversation."""
    named = tokenizer.chat_template
    if isinstance(named, Mapping) and "default" not in named and not (tools and "tool_use" in named):
        raise TemplateFailure(
            f"the tokenizer has chat templates named {', '.join(map(repr, named))} and none named 'default': give the "
            "one that training used this name in tokenizer_config.json or chat_template.jinja"
        )


def _call(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None, *, ask: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) if tools else None,
            tokenize=False,
            add_generation_prompt=ask,
        )
    except MemoryError:
        raise  # the process that a template runs in has a limit (`runtime.guarded_process`)
    except Exception as error:  # a template is a program: it can raise anything
        raise TemplateFailure(one_line(error)) from error
    if len(text) > MOST_ADDED:
        given = len(json.dumps([list(messages), tools], default=str, ensure_ascii=False))
        if len(text) > MOST_ADDED + MOST_TIMES * given:
            raise TemplateFailure(f"it writes {len(text):,} characters for a conversation of {given:,}")
    return text
