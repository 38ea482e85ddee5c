"""Prompts of held-out rows: a conversation up to its last answer, whose turn is opened.

Rows of plain text have prompts where their first tokens are taken for some. A few rows are taken, spread over all of
them, always the same.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from requant.data import chat_template, long_texts, template_call
from requant.data.canaries import prompt_ids
from requant.data.columns import Columns, Format, columns_of, is_joined_as_it_is
from requant.data.conversation import Conversation, Message, RowError
from requant.data.documents import joined
from requant.data.row_files import Row, TextSource, read_rows
from requant.data.template_losses import CLOSE, OPEN, TemplateFailure
from requant.runtime.cuda_graph import capture_on
from requant.runtime.guarded_process import LimitError, call_guarded, guarded

TRIED = 8  # rows of a part, of which the first that can be asked is
UNENDED = 3  # rows on which a template exceeds its limits, after which no more are tried
FORM = 2  # of saved answers: their texts, and whether a stop token ended them
LONGEST_TOKEN = 32  # characters of a text for each token of its beginning
_MARK = OPEN + CLOSE
_THOUGHT = re.compile(r"[<\[][/|]?[\w:]*(?:think|thought|reasoning)[\w:]*\|?[>\]]", re.IGNORECASE)


Answer = tuple[str, bool]
"""The text of an answer without its stop token, and whether one ended it."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of a held-out row.

    row: its number, from 1. shown: its last message. text: what the model reads. own: the row's own answer.
    tools: of the row, as OpenAI writes them; () also where calls are in a notation that is not read. calls: whether
    the row's own answer makes a call. plain: the beginning of a plain text.
    """

    row: int
    shown: str
    text: str
    ids: tuple[int, ...]
    own: str
    tools: tuple[Any, ...] = ()
    calls: bool = False
    plain: bool = False


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts of one evaluation set, and how they are answered.

    why: why there are none, in words, or "". stops: ids that end an answer. asked: variants.
    stream: `evaluate.stream`, which decides whether a variant is asked.
    """

    set_name: str
    items: tuple[Prompt, ...] = ()
    why: str = ""
    new_tokens: int
    stops: tuple[int, ...] = ()
    decode: Callable[[list[int]], str]
    asked: tuple[str, ...] = ()
    kind: str = "answers"
    stream: str = "auto"

    @property
    def digest(self) -> str:
        """Of everything that an answer depends on except the model."""
        asked = [
            [item.ids for item in self.items],
            self.new_tokens,
            self.stops,
            FORM,
            *([self.stream] * (self.stream != "auto")),
        ]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    @property
    def told(self) -> list[Any]:
        """What else the report says of them and judges answers by."""
        return [
            self.set_name,
            self.why,
            *((p.row, p.shown, p.text, p.own, p.tools, p.calls, p.plain) for p in self.items),
        ]

    def ask(self, model: Any, device: torch.device, on_progress: Callable[[int, int], None]) -> list[Answer]:
        """The answers of one variant's model.

        [] of a model that runs block by block: each token would take a pass through all of its weights.
        """
        from requant_eval.scoring.answers import answer

        if hasattr(model, "last_logits"):
            return []
        prompts = [item.ids for item in self.items]
        given = answer(
            model, prompts, self.new_tokens, stops=self.stops, device=device, on_progress=on_progress,
            capture=capture_on(device),
        )  # fmt: skip
        ended = [bool(ids) and ids[-1] in self.stops for ids in given]
        return [(self.decode(ids[:-1] if end else ids), end) for ids, end in zip(given, ended, strict=True)]

    def fits(self, answers: Sequence[Any]) -> bool:
        """Whether these can be the answers of a variant, as they are read from a file."""
        return len(answers) in (0, len(self.items)) and all(
            isinstance(given, list) and [type(part) for part in given] == [str, bool] for given in answers
        )


def held_out(
    source: TextSource,
    tokenizer: Any,
    asked: Format,
    *,
    count: int,
    longest: int,
    reads_calls: Callable[[str], bool],
    begin: int | None = None,
) -> tuple[list[Prompt], str]:
    """(at most `count` prompts, why there are none or "").

    longest: tokens of a prompt, at most. reads_calls: whether a text makes tool calls in a notation that is checked.
    begin: tokens of a plain text that are its prompt; None: it has none.
    """
    rows = read_rows(source)
    columns = columns_of(source, rows, asked)
    if columns.kind == "text":
        if begin is None:
            return [], "the rows are plain text and have no prompt"
        return _beginnings(columns, tokenizer, rows, count, begin)
    if begin is not None:
        return [], "its rows are no plain text, and evaluate.answers.begin is for plain text alone (leave it out)"
    if tokenizer.chat_template and (wrong := unopened(tokenizer)):
        return [], wrong
    parts = list(_parts(rows, count))
    numbers = [i for part in parts for i in part]
    render = partial(_rendered, columns, tokenizer, reads_calls)
    rendered = dict(zip(numbers, _guarded(render, [rows[i] for i in numbers]), strict=False))
    prompts: list[Prompt] = []
    too_long = 0
    for part in parts:
        for number in part:
            found = rendered.get(number)
            made = _prompt(number + 1, found, tokenizer) if found is not None else None
            too_long += made is not None and len(made.ids) > longest
            if made and len(made.ids) <= longest and all(made.ids != other.ids for other in prompts):
                prompts.append(made)
                break
    if prompts:
        return prompts, ""
    return [], f"no prompt is shorter than {longest} tokens" if too_long else "no row has a prompt before an answer"


def _beginnings(
    columns: Columns, tokenizer: Any, rows: Sequence[Row], count: int, begin: int
) -> tuple[list[Prompt], str]:
    """The first `begin` tokens of a few plain texts that go on after them."""
    found: list[Prompt] = []
    for part in _parts(rows, count):
        for number in part:
            made = _beginning(number + 1, columns, tokenizer, rows[number], begin)
            if made is not None and all(made.ids != other.ids for other in found):
                found.append(made)
                break
    return found, "" if found else f"no row has more than {begin} tokens"


def _beginning(row: int, columns: Columns, tokenizer: Any, given: Row, begin: int) -> Prompt | None:
    try:
        text = (columns.text_in(given) or "")[: begin * LONGEST_TOKEN]
        if not text.strip() or long_texts.longest_word(text) > long_texts.LONGEST_WORD:
            return None
        ids = prompt_ids(tokenizer, text)
    except (RowError, UnicodeEncodeError):
        return None
    if len(ids) <= begin:
        return None
    shown, own = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:begin], ids[begin:]))
    return Prompt(row=row, shown=str(shown), text=str(shown), ids=tuple(ids[:begin]), own=str(own), plain=True)


def unopened(tokenizer: Any) -> str:
    """How a chat template fails to open the turn of an answer; "" where it does.

    It does not where asking for an answer adds nothing, and answers have words of the template before them, besides
    tags of a thought. (Words after those that asking adds, such as a channel's name, are the model's own to write.)
    """
    user: Message = {"role": "user", "content": "?"}
    answer: Message = {"role": "assistant", "content": _MARK}
    call = partial(template_call.apply, tokenizer)
    try:
        opened = call_guarded(partial(call, [user], None, ask=True))
        left = call_guarded(partial(call, [user], None))
        before, mark, _ = call_guarded(partial(call, [user, answer], None)).partition(_MARK)
    except (TemplateFailure, LimitError) as error:
        return f"the chat template does not open the turn of an answer: {error}"
    missing = _THOUGHT.sub("", before.removeprefix(opened)).strip() if before.startswith(opened) else ""
    if not (mark and missing and left.startswith(opened)):
        return ""
    return (
        f"the chat template does not open the turn of an answer: it leaves out {missing!r:.60} where one is asked for"
    )


def _parts(rows: Sequence[Row], count: int) -> Iterator[range]:
    """The first rows of each of `count` equal parts of all rows."""
    for part in range(min(count, len(rows))):
        start, stop = (len(rows) * at // min(count, len(rows)) for at in (part, part + 1))
        yield range(start, min(stop, start + TRIED))


def _guarded(render: Callable[[Row], Any], rows: Sequence[Row]) -> Iterator[Any]:
    """`render` of each row within limits; None of a row on which a template exceeds them, the last of a few such."""
    at = 0
    for _ in range(UNENDED):
        try:
            for made in guarded(render, rows[at:]):
                at += 1
                yield made
            return
        except LimitError:
            at += 1
            yield None


def _rendered(
    columns: Columns, tokenizer: Any, reads_calls: Callable[[str], bool], row: Row
) -> Mapping[str, Any] | None:
    """The fields of a row's prompt, but for its tokens; None for a row that cannot be asked."""
    try:
        given = columns.conversation_in(row)
        last = _last_answer(given.messages) if given is not None else 0
        if given is None or last < 1:
            return None
        before, answer = given.messages[:last], given.messages[last]
        shown = {"shown": str(before[-1]["content"]), "own": str(answer["content"])}
        if not tokenizer.chat_template:
            text, spans, _ = joined(given, as_they_are=is_joined_as_it_is(columns))
            return {"text": text[: spans[0][0]], **shown}
        asked = Conversation(messages=before, tools=given.tools, learned=given.learned[:last])
        text = chat_template.opened(tokenizer, asked)
        calls = bool(answer.get("tool_calls"))
        whole = Conversation(messages=given.messages[: last + 1], tools=given.tools, learned=given.learned[: last + 1])
        read = not calls or reads_calls(_after(text, chat_template.render(tokenizer, whole)[0]))
        return {"text": text, **shown, "tools": tuple(given.tools or ()) if read else (), "calls": calls}
    except RowError:
        return None


def _last_answer(messages: Sequence[Message]) -> int:
    """The index of the assistant's last message; 0 where there is none."""
    return max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)


def _after(prompt: str, whole: str) -> str:
    """The part of a text in which it differs from the prompt that it begins with."""
    same = (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b)
    return whole[next(same, min(len(prompt), len(whole))) :]


def _prompt(row: int, found: Mapping[str, Any], tokenizer: Any) -> Prompt | None:
    """The prompt with its tokens; None where it has none, or more than are tokenized."""
    if not found["text"].strip() or long_texts.longest_word(found["text"]) > long_texts.LONGEST_WORD:
        return None
    try:
        return Prompt(row=row, ids=prompt_ids(tokenizer, found["text"]), **found)
    except UnicodeEncodeError:
        return None
