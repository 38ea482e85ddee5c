"""Rows of a dataset as token documents: plain text, chats, or prompts with completions.

A document is token ids with one flag a token: whether the token belongs to the text that the model learns to produce
(the completion, the assistant's turns, or all of a plain text). Nothing is left out silently: what a row or the
template leaves out is counted in notes, or refused with the row.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from requant.data import chat_template, long_texts
from requant.data.chat_template import Spans
from requant.data.columns import COMPLETION_KEYS, Columns, Format, columns_of, is_joined_as_it_is
from requant.data.conversation import Conversation, RowError
from requant.data.row_files import Row, TextSource, read_rows
from requant.data.tokenizer import adds_bos
from requant.data.tokenizer import notes as tokenizer_notes
from requant.errors import InputError
from requant.runtime.guarded_process import LimitError, guarded

__all__ = [
    "COMPLETION_KEYS",
    "Format",
    "Row",
    "TextSource",
    "TokenDocument",
    "adds_bos",
    "read_rows",
    "read_texts",
    "sample_answers",
    "tokenize",
]
EMPTY = "rows without text or without an answer were left out"
LAST_ONLY = "the chat template rewrites earlier turns: only the last answer of a row counts as completion"
NO_TEMPLATE = "the tokenizer has no chat template: "
JOINED = NO_TEMPLATE + "prompt and answer were joined as they are, with the blank or line end that stands there"
AS_THEY_ARE = (
    NO_TEMPLATE + "prompt and completion were joined with nothing between them, as trainers join these columns"
)
BY_LINE = NO_TEMPLATE + (
    "the answer begins a new line after its question; if training put something else there, write it into columns "
    "named prompt and completion, which are joined as they are"
)
AFTER_EOS = 4  # tokens at the end of a document among which EOS is looked for
ACROSS = "a token holds the end of the prompt and the beginning of the answer: it counts as answer, whole"


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """A tokenized document.

    ids: without BOS. scored: one flag a token, True inside completions. n_bytes: of the flagged text in UTF-8.
    ended: whether the text itself ends in EOS, blanks and line ends after it aside, as chat templates write it.
    """

    ids: tuple[int, ...]
    scored: tuple[bool, ...]
    n_bytes: int
    ended: bool = False

    def marked(self, bos: int | None, eos: int | None) -> list[int]:
        """The ids with `bos` in front and one EOS at the end, as documents are packed; None: the token is left out."""
        return [*([] if bos is None else [bos]), *self.ids, *([] if eos is None or self.ended else [eos])]


_Rendered = tuple[str, Spans, list[str]]  # as of `_Reader._render`


@dataclass
class _Reader:
    """Renders the rows of one source. completions: whether the parts that are completion are located."""

    source: TextSource
    columns: Columns
    tokenizer: Any
    completions: bool
    bos: int | None
    told: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)
    lost: dict[Any, tuple[str, ...]] = field(default_factory=dict)

    def documents(self, rows: Sequence[Row]) -> Iterator[TokenDocument]:
        for number, rendered in enumerate(self._rendered(rows), 1):
            try:
                if isinstance(rendered, RowError):
                    raise rendered
                encoded = None if rendered is None else _encode(self.tokenizer, rendered[0], rendered[1], self.bos)
            except RowError as error:
                raise InputError(
                    f"{self.source.where}: row {number} is not a {self.columns.kind} row: {error}"
                ) from error
            if rendered is None or encoded is None:
                self._tell(EMPTY, number)
                continue
            for note in (*rendered[2], *encoded[1]):
                self._tell(note, number)
            if encoded[0].ids:
                yield encoded[0]

    def _rendered(self, rows: Sequence[Row]) -> Iterator[_Rendered | RowError | None]:
        """`_render` of every row, its error in place of what it raises. A template's program runs within limits."""

        def render(row: Row) -> _Rendered | RowError | None:
            try:
                return self._render(row)
            except RowError as error:
                return error

        if self.columns.kind == "text" or not self.tokenizer.chat_template:
            yield from map(render, rows)
            return
        try:
            yield from guarded(render, rows)
        except LimitError as error:
            yield RowError(
                f"the chat template {error}: use the template that the adapter was trained with, or format text"
            )

    def _render(self, row: Row) -> _Rendered | None:
        """(text, spans of it that count as completion, what was changed); None for a row without text."""
        if self.columns.kind == "text":
            text = self.columns.text_in(row)
            return None if text is None else (text, [(0, len(text))], [])
        given = self.columns.conversation_in(row)
        if given is None:
            return None
        if self.columns.kind == "completion" and not self.tokenizer.chat_template:
            return joined(given, as_they_are=is_joined_as_it_is(self.columns))
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


def joined(given: Conversation, *, as_they_are: bool) -> tuple[str, Spans, list[str]]:
    """Prompt and answer as one text, for a tokenizer without a template.

    as_they_are: of columns that trainers join without anything between them. Others are two texts: where neither brings
    a blank or a line end, the answer begins a new line.
    """
    *before, answer = [m["content"] or "" for m in given.messages]
    if given.tools or any(m.get("tool_calls") for m in given.messages):
        raise RowError("holds tools, and the tokenizer has no chat template to render them")
    if any(m["role"] != "user" for m in given.messages[:-1]) or len(before) > 1:
        raise RowError("holds system text or several turns, and the tokenizer has no chat template to render them")
    prompt, notes = before[0] if before else "", list[str]()
    if prompt and answer:
        parted = prompt[-1].isspace() or answer[0].isspace()
        if not parted:
            notes = [AS_THEY_ARE if as_they_are else BY_LINE]
            prompt += "" if as_they_are else "\n"
        elif not as_they_are:
            notes = [JOINED]
    return prompt + answer, [(len(prompt), len(prompt) + len(answer))], notes


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
    reader = _Reader(source, columns, tokenizer, completions, tokenizer.bos_token_id if adds_bos(tokenizer) else None)
    documents = list(reader.documents(rows))
    if not documents:
        raise InputError(f"{source.where}: every row is empty")
    if notes is not None:
        notes += reader.notes(len(rows))
    return documents


def sample_answers(source: TextSource, tokenizer: Any, asked: Format = "auto", *, count: int) -> list[TokenDocument]:
    """Some `count` rows as documents, evenly spread, with the tokens of answers flagged.

    None for plain text, and where rows or chat template do not tell which part is the answer.
    """
    rows = read_rows(source)
    columns = columns_of(source, rows, asked)
    if columns.kind == "text":
        return []
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    picked = rows[:: max(1, len(rows) // count)][:count]
    try:
        return list(_Reader(source, columns, tokenizer, True, bos).documents(picked))
    except InputError:
        return []


def _encode(tokenizer: Any, text: str, spans: Spans, bos: int | None) -> tuple[TokenDocument, list[str]]:
    """(the text as a document, what to tell of it), tokenized whole at once.

    A token is flagged when part of it lies in a span. bos: a template or text may begin with it; it is taken off.
    """
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(
                f"holds half of a character at {error.start}: {text[error.start - 20 : error.start]!r}"
            ) from error
    if (word := long_texts.longest_word(text)) > long_texts.LONGEST_WORD:
        raise RowError(
            f"holds {word:,} characters without a blank or line end, at most {long_texts.LONGEST_WORD:,} are read: "
            "break them up, or leave the row out"
        )
    if not getattr(tokenizer, "is_fast", True):
        return _encode_whole(tokenizer, text, spans, bos), []
    found, places = long_texts.encode(tokenizer, text)
    ids = _without_bos(found, bos)
    taken_off = len(found) - len(ids)
    off, offsets = places[:taken_off], places[taken_off:]
    spans = [(max(start, off[-1][1]), stop) for start, stop in spans] if off else spans
    scored = tuple(any(a < stop and (b > start or a >= start) for start, stop in spans) for a, b in offsets)
    flagged = [(_token_start(offsets, start), stop) for start, stop in spans]
    across = any(text[a:start].strip() for (a, _), (start, _) in zip(flagged, spans, strict=True) if a < start)
    n_bytes = sum(len(text[a:b].encode()) for a, b in flagged)
    return TokenDocument(tuple(ids), scored, n_bytes, _ends(tokenizer, ids)), [ACROSS] if across else []


def _encode_whole(tokenizer: Any, text: str, spans: Spans, bos: int | None) -> TokenDocument:
    """A document of a tokenizer that does not say where its tokens stand: it counts whole or not at all."""
    if spans != [(0, len(text))]:
        raise RowError("its answer cannot be located: the tokenizer gives no offsets; use score: all")
    found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = _without_bos(found, bos)
    n_bytes = len(text.encode()) - (len(found) - len(ids)) * len((tokenizer.bos_token or "").encode())
    return TokenDocument(tuple(ids), (True,) * len(ids), n_bytes, _ends(tokenizer, ids))


def _without_bos(ids: list[int], bos: int | None) -> list[int]:
    """The ids from the first that is not `bos`: it may stand there twice, of a template and of the text."""
    return ids[next((i for i, token in enumerate(ids) if token != bos), len(ids)) :]


def _token_start(offsets: Sequence[tuple[int, int]], at: int) -> int:
    """Where the token begins that holds the character `at`; `at` where none does."""
    index = bisect_right(offsets, at, key=lambda pair: pair[0]) - 1
    return offsets[index][0] if index >= 0 and offsets[index][1] > at else at


def _ends(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Whether the ids end in EOS, with nothing but blanks and line ends after it."""
    last = next((i for i in range(1, min(len(ids), AFTER_EOS) + 1) if ids[-i] == tokenizer.eos_token_id), 0)
    return last == 1 or (last > 1 and not tokenizer.decode(ids[1 - last :]).strip())
