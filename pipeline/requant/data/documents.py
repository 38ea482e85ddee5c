"""Rows of a dataset as token documents: plain text, chats, or prompts with completions.

A document is token ids with one flag a token: whether the token belongs to the text that the model learns to produce
(the completion, the assistant's turns, or all of a plain text). Nothing is left out silently: what a row or the
template leaves out is counted in notes, or refused with the row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from requant.data import chat_template
from requant.data.chat_template import Spans
from requant.data.columns import COMPLETION_KEYS, Columns, Format, columns_of
from requant.data.conversation import Conversation, RowError
from requant.data.row_files import Row, TextSource, read_rows
from requant.data.tokenizer import adds_bos
from requant.data.tokenizer import notes as tokenizer_notes
from requant.errors import InputError

__all__ = [
    "COMPLETION_KEYS",
    "Format",
    "Row",
    "TextSource",
    "TokenDocument",
    "adds_bos",
    "read_rows",
    "read_texts",
    "tokenize",
]
EMPTY = "rows without text or without an answer were left out"
LAST_ONLY = "the chat template rewrites earlier turns: only the last answer of a row counts as completion"
JOINED = "the tokenizer has no chat template: prompt and answer were joined as they are"


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """A tokenized document.

    ids: without BOS. scored: one flag a token, True inside completions. n_bytes: of the flagged text in UTF-8.
    """

    ids: tuple[int, ...]
    scored: tuple[bool, ...]
    n_bytes: int


@dataclass
class _Reader:
    """Renders the rows of one source. completions: whether the parts that are completion are located."""

    source: TextSource
    columns: Columns
    tokenizer: Any
    completions: bool
    told: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    lost: dict[Any, tuple[str, ...]] = field(default_factory=dict)

    def documents(self, rows: Sequence[Row]) -> Iterator[TokenDocument]:
        for number, row in enumerate(rows, 1):
            try:
                rendered = self._render(row)
                document = None if rendered is None else _encode(self.tokenizer, rendered[0], rendered[1])
            except RowError as error:
                raise InputError(
                    f"{self.source.where}: row {number} is not a {self.columns.kind} row: {error}"
                ) from error
            if rendered is None or document is None:
                self._tell(EMPTY, number)
                continue
            for note in rendered[2]:
                self._tell(note, number)
            if document.ids:
                yield document

    def _render(self, row: Row) -> tuple[str, Spans, list[str]] | None:
        """(text, spans of it that count as completion, what was changed); None for a row without text."""
        if self.columns.kind == "text":
            text = self.columns.text_in(row)
            return None if text is None else (text, [(0, len(text))], [])
        given = self.columns.conversation_in(row)
        if given is None:
            return None
        if self.columns.kind == "completion" and not self.tokenizer.chat_template:
            return _joined(given, told=self.columns.prompt != "prompt")
        text, rendered, notes = chat_template.render(self.tokenizer, given, self.lost)
        if not self.completions:
            return text, [(0, len(text))], notes
        spans = chat_template.learned_spans(self.tokenizer, text, rendered)
        return text, spans, [*notes, *([LAST_ONLY] if len(spans) < sum(rendered.learned) else [])]

    def _tell(self, note: str, row: int) -> None:
        self.told[note] += 1
        self.first.setdefault(note, row)

    def notes(self, rows: int) -> list[str]:
        """What was changed or left out, with counts and the first row."""
        counted = [
            f"{self.source}: {note} ({count} of {rows} rows, the first is row {self.first[note]})"
            for note, count in self.told.items()
        ]
        if self.columns.left_out:
            names = ", ".join(self.columns.left_out)
            counted.append(
                f"{self.source}: columns that are not read: {names} (short labels; data.ignore silences this)"
            )
        chat = self.columns.kind != "text" and bool(self.tokenizer.chat_template)
        return [*counted, *tokenizer_notes(self.tokenizer, chat=chat)]


def _joined(given: Conversation, *, told: bool) -> tuple[str, Spans, list[str]]:
    """Prompt and answer as one text, for a tokenizer without a template: messages follow each other by lines."""
    *before, answer = [m["content"] or "" for m in given.messages]
    if given.tools or any(m.get("tool_calls") for m in given.messages):
        raise RowError("holds tools, and the tokenizer has no chat template to render them")
    if any(m["role"] != "user" for m in given.messages[:-1]) or len(before) > 1:
        raise RowError("holds system text or several turns, and the tokenizer has no chat template to render them")
    prompt = before[0] if before else ""
    return prompt + answer, [(len(prompt), len(prompt) + len(answer))], [JOINED] if told else []


def read_texts(source: TextSource) -> list[str]:
    """The text column of a source, for protocols that join texts before tokenizing."""
    rows = read_rows(source)
    columns, texts = columns_of(source, rows, "text"), []
    for number, row in enumerate(rows, 1):
        try:
            text = columns.text_in(row)
        except RowError as error:
            raise InputError(f"{source.where}: row {number} is not a text row: {error}") from error
        texts += [] if text is None else [text]
    return texts


def tokenize(
    source: TextSource,
    tokenizer: Any,
    asked: Format = "auto",
    *,
    completions: bool = True,
    notes: list[str] | None = None,
) -> list[TokenDocument]:
    """Every row of a source as a document, except rows without text or answer.

    completions: flag only what the model learns to produce; False: all of it, which every chat template allows.
    notes: what was left out or changed is added. Raises InputError for columns or roles that do not fit the format, for
    rows that the chat template refuses, and when every row is empty.
    """
    rows = read_rows(source)
    columns = columns_of(source, rows, asked)
    reader = _Reader(source, columns, tokenizer, completions)
    documents = list(reader.documents(rows))
    if not documents:
        raise InputError(f"{source.where}: every row is empty")
    if notes is not None:
        notes += reader.notes(len(rows))
    return documents


def _encode(tokenizer: Any, text: str, spans: Spans) -> TokenDocument:
    """Tokenize the whole text at once; a token is flagged when part of it lies in a span."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"holds half of a character at {error.start}: {text[error.start - 20 : error.start]!r}"
            ) from error
    if not getattr(tokenizer, "is_fast", True):
        return _encode_whole(tokenizer, text, spans)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    bos = tokenizer.bos_token_id
    if adds_bos(tokenizer) and ids and ids[0] == bos:  # a template that writes BOS itself
        ids, offsets = ids[1:], offsets[1:]
    scored = tuple(any(a < stop and (b > start or a >= start) for start, stop in spans) for a, b in offsets)
    return TokenDocument(tuple(ids), scored, sum(len(text[a:b].encode()) for a, b in spans))


def _encode_whole(tokenizer: Any, text: str, spans: Spans) -> TokenDocument:
    """A document of a tokenizer that does not say where its tokens stand: it counts whole or not at all."""
    if spans != [(0, len(text))]:
        raise RowError("its answer cannot be located: the tokenizer gives no offsets; use score: all")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = ids[1:] if adds_bos(tokenizer) and ids[:1] == [tokenizer.bos_token_id] else ids
    return TokenDocument(tuple(ids), (True,) * len(ids), len(text.encode()))
