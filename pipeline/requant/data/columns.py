"""Columns of a row file: which hold the text; no other text is left out without a word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from requant.data.conversation import (
    Conversation,
    RowError,
    conversation,
    is_messages,
    parsed,
    prompt_and_answer,
    text_of,
    tools_of,
)
from requant.data.row_files import Row, TextSource
from requant.errors import InputError

Format = Literal["auto", "text", "chat", "completion"]
TEXT_KEYS = ("text", "content")
CHAT_KEYS = ("messages", "conversations", "conversation")
COMPLETION_KEYS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("prompt", "response"),
    ("question", "response"),
    ("query", "response"),
    ("problem", "solution"),
    ("input", "output"),
    ("prompt", "answer"),
    ("query", "answer"),
    ("problem", "answer"),
    ("input", "response"),
    ("instruction", "completion"),
    ("question", "solution"),
    ("problem", "generated_solution"),
    ("question", "generated_solution"),
    ("inputs", "targets"),
    ("input", "target"),
)
CONTEXT_KEYS = ("input", "context")  # what a question is about; follows it
SYSTEM_KEYS = ("system", "system_prompt")
TOOL_KEYS = ("tools", "functions")
HISTORY = "history"
PREFERENCE = ("chosen", "rejected")
LABEL = 64  # characters up to which a value of few words is a label, not text
WORDS = 6  # words from which a value is text
TITLES = ("title", "subtitle", "headline", "name", "topic", "subject")  # labels of any number of words on one line
TITLE = 160  # characters up to which such a value is a label
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
CHOICES = ("choices", "options", "candidates", "endings")
ROLE_COLUMNS = {*(k for pair in COMPLETION_KEYS for k in pair), *CONTEXT_KEYS, *SYSTEM_KEYS, *TOOL_KEYS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns of a source are read, by what they hold. kind: never `auto`. left_out: labels that are not read."""

    kind: Format
    text: str | None = None
    chat: str | None = None
    prompt: str | None = None
    answer: str | None = None
    context: tuple[str, ...] = ()
    system: str | None = None
    tools: str | None = None
    history: str | None = None
    left_out: tuple[str, ...] = ()

    @property
    def used(self) -> set[str]:
        named = (self.text, self.chat, self.prompt, self.answer, self.system, self.tools, self.history)
        return {*self.context, *(n for n in named if n is not None)}

    def text_in(self, row: Row) -> str | None:
        """The text of a row of plain text; None when null."""
        return text_of(_cell(row, self.text))

    def conversation_in(self, row: Row) -> Conversation | None:
        """The conversation of a row; None when it, a prompt or an answer is null. Raises RowError."""
        if self.chat is not None:
            found = conversation(_cell(row, self.chat))
        else:
            prompt, answer = _cell(row, self.prompt), _cell(row, self.answer)
            if not is_messages(prompt) and prompt is not None:
                context = [text for k in self.context if (text := text_of(row.get(k)))]
                prompt = "\n".join([text_of(prompt) or "", *context])
            found = prompt_and_answer(prompt, answer, _history(row.get(self.history) if self.history else None))
        if found is None:
            return None
        system = text_of(row.get(self.system)) if self.system else None
        return found.led_by(system).with_tools(tools_of(row.get(self.tools)) if self.tools else None)


def is_joined_as_it_is(columns: Columns) -> bool:
    """Whether the columns are prompt and completion, which trainers join with nothing between them."""
    return (columns.prompt, columns.answer) == COMPLETION_KEYS[0]


def columns_of(source: TextSource, rows: Sequence[Row], asked: Format) -> Columns:
    """How the rows of a source are read; `auto` is resolved from the columns of its first row.

    Raises InputError, naming the columns found, when they do not fit the format, or when text would be left out.
    """
    first = rows[0]
    found = ", ".join(map(str, first)) or "none"
    if source.column is not None and source.column not in first:
        raise InputError(f"{source.where}: no column {source.column!r}; it has {found}")
    wrong = [name for name in source.ignore if not any(name in row for row in rows)]
    if wrong:
        raise InputError(f"{source.where}: ignore names {wrong[0]!r}, which is no column; it has {found}")
    columns = _columns(source, rows, asked)
    _check_one_form(source, rows, columns, chosen=asked != "auto")
    if source.column is not None:
        return columns
    return replace(columns, left_out=_left_out(source, rows, columns, chosen=asked != "auto"))


def _columns(source: TextSource, rows: Sequence[Row], asked: Format) -> Columns:
    first = rows[0]
    found = ", ".join(map(str, first)) or "none"
    every = dict.fromkeys(k for row in rows for k in row)  # of JSON lines each may have its own
    chat = source.column or next((k for k in CHAT_KEYS if k in first), None)
    pair = next((p for p in COMPLETION_KEYS if all(k in first for k in p)), None)
    text = source.column or next((k for k in TEXT_KEYS if k in first), None)
    if asked == "auto":
        asked = "text" if source.column and not _holds_messages(rows, source.column) else "auto"
    if asked == "auto":
        asked = "chat" if chat else "completion" if pair else "chat" if text and _holds_messages(rows, text) else "text"
        chat = chat or text
    system = next((k for k in SYSTEM_KEYS if k in every), None)
    tools = next((k for k in TOOL_KEYS if k in every), None)
    if asked == "text":
        if text is None:
            raise InputError(_no_text(source, first, found))
        return Columns(kind="text", text=text)
    if asked == "chat":
        if chat is None:
            names = " or ".join(CHAT_KEYS[:2])
            if pair:
                raise InputError(
                    f"{source.where}: no chat column ({names}): these are rows of {' and '.join(pair)} "
                    f"(it has {found}), which format: auto reads, the default: leave format out"
                )
            raise InputError(f"{source.where}: no chat column ({names}); it has {found}: set data.column")
        return Columns(kind="chat", chat=chat, system=system, tools=tools)
    if pair is None:
        if chat:
            raise InputError(
                f"{source.where}: no prompt and completion columns: these are rows of {chat} (it has {found}), "
                "which format: auto reads, the default: leave format out"
            )
        raise InputError(f"{source.where}: no prompt and completion columns; it has {found}")
    return Columns(
        kind="completion",
        prompt=pair[0],
        answer=pair[1],
        context=tuple(k for k in CONTEXT_KEYS if k in every and k not in pair),
        system=system,
        tools=tools,
        history=HISTORY if HISTORY in every else None,
    )


def _check_one_form(source: TextSource, rows: Sequence[Row], columns: Columns, *, chosen: bool) -> None:
    """Raise InputError, with their numbers, for rows that hold their text in other columns than the first row.

    chosen: as of `_left_out`. Columns that may be left out and a null in the column that is used are no other form.
    """
    read = tuple(k for k in (columns.text, columns.chat, columns.prompt, columns.answer) if k is not None)
    others: dict[tuple[str, ...], list[int]] = {}
    for number, row in enumerate(rows, 1):
        if any(row.get(k) is not None for k in read) or (chosen and all(k in row for k in read)):
            continue
        form = _form(row)
        if form and not (all(k in row for k in read) and set(form) <= set(source.ignore)):
            others.setdefault(form, []).append(number)
    if not others:
        return
    first = len(rows) - sum(map(len, others.values()))
    told = "; ".join(f"{' and '.join(form)} from row {own[0]} on, {len(own)} rows" for form, own in others.items())
    raise InputError(
        f"{source.where}: rows of two forms: {' and '.join(read)} in {first} rows; {told}. A file has one form: "
        "make a file of each, and give both, as two entries of calibration.mix (or two of evaluate.sets)"
    )


def _form(row: Row) -> tuple[str, ...]:
    """The columns that hold a row's text, looked at alone; none where it has no known ones."""
    forms = (*((k,) for k in CHAT_KEYS), *COMPLETION_KEYS, *((k,) for k in TEXT_KEYS))
    return next((form for form in forms if all(row.get(k) is not None for k in form)), ())


def _cell(row: Row, column: str | None) -> Any:
    """A value of a row; raises RowError when the row lacks the column."""
    if column is None or column not in row:
        raise RowError(f"it has no column {column!r}; it has {', '.join(map(str, row)) or 'none'}")
    return row[column]


def _no_text(source: TextSource, first: Row, found: str) -> str:
    if all(k in first for k in PREFERENCE):
        return (
            f"{source.where}: preference pairs ({found}): calibrate and judge on answers the model should give; "
            "write rows of prompt and completion from chosen"
        )
    return (
        f"{source.where}: no text column ({' or '.join(TEXT_KEYS)}); it has {found}: set data.column to the text, "
        "or rename the columns of a prompt and its answer to prompt and completion"
    )


def _holds_messages(rows: Sequence[Row], column: str) -> bool:
    return next((is_messages(r[column]) for r in rows if r.get(column)), False)


def _history(value: Any) -> Iterator[tuple[str, str]]:
    """Earlier turns of an instruction: pairs of prompt and answer. Raises RowError."""
    if isinstance(value, str):
        value = parsed(value)
    if value and (isinstance(value, str) or not isinstance(value, Sequence)):
        raise RowError("history: expected a list of pairs of prompt and answer")
    for pair in value or ():
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise RowError("history: expected pairs of prompt and answer")
        yield text_of(pair[0]) or "", text_of(pair[1]) or ""


def _left_out(source: TextSource, rows: Sequence[Row], columns: Columns, *, chosen: bool) -> tuple[str, ...]:
    """Columns with labels of several words, which no document holds.

    chosen: the recipe names the format, so columns of another format are known to be left out. Raises InputError naming
    a column with prose that no document would hold.
    """
    of_kind = {"text": TEXT_KEYS, "chat": CHAT_KEYS, "completion": tuple(k for p in COMPLETION_KEYS for k in p)}
    others = {k for kind, keys in of_kind.items() if kind != columns.kind for k in keys} if chosen else set()
    labels: list[str] = []
    names = dict.fromkeys(k for row in rows for k in row)
    for name in names:
        if name in columns.used or name in others or name in source.ignore:
            continue
        held = [row for row in rows if row.get(name) is not None]
        if any(_is_text(name, row[name]) and not _repeated(row[name], row, columns) for row in held):
            used = ", ".join(k for k in names if k in columns.used)
            raise InputError(
                f"{source.where}: column {name!r} holds text that would be left out (used: {used}). Name the column to "
                f"use in data.column, put its text into one of the used columns, or allow it: data.ignore: [{name}]"
            )
        if any(_has_words(row[name]) and not _repeated(row[name], row, columns) for row in held):
            labels.append(name)
    return tuple(labels)


def _is_text(name: str, value: Any) -> bool:
    """Whether a value holds more than labels: prose, anywhere inside it, or what a media column names."""
    if name in (*MEDIA, *CHOICES) and value:
        return True
    if name in ROLE_COLUMNS and any(isinstance(leaf, str) and leaf.strip() for leaf in _leaves(value)):
        return True  # what it is called says that it is text, however short
    return any(isinstance(leaf, str) and _is_prose(leaf, titled=_names_titles(name)) for leaf in _leaves(value))


def _names_titles(name: str) -> bool:
    """Whether a column is called by what it titles: `title`, `page_title`, `Topic`."""
    return name.lower().rpartition("_")[2] in TITLES


def _has_words(value: Any) -> bool:
    """Whether a value holds a label of several words."""
    return any(isinstance(leaf, str) and " " in leaf.strip() for leaf in _leaves(value))


def _is_prose(text: str, *, titled: bool = False) -> bool:
    """Whether a string is more than a label, an address or a key: several words or lines; of a title, several lines."""
    text = text.strip()
    if titled and "\n" not in text:
        return len(text) > TITLE
    if "\n" in text or len(text.split()) >= WORDS:
        return True
    written_without_blanks = not text.isascii() and " " not in text
    return len(text) > (LABEL // 4 if written_without_blanks else LABEL) and (" " in text or written_without_blanks)


def _repeated(value: Any, row: Row, columns: Columns) -> bool:
    """Whether a value only repeats what the used columns hold, or is their rendering."""
    used = [_squeezed(x) for k in columns.used for x in _leaves(row.get(k)) if isinstance(x, str)]
    whole = " ".join(used)
    own = [_squeezed(x) for x in _leaves(value) if isinstance(x, str)]
    inside = all(x in whole for x in own)
    said = [x for x in used if " " in x]
    return inside or (isinstance(value, str) and bool(said) and all(x in own[0] for x in said))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for v in value.values():
            yield from _leaves(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _leaves(v)
    else:
        yield value


def _squeezed(text: str) -> str:
    return " ".join(text.split())
