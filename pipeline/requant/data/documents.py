"""Rows of a dataset as token documents: plain text, chats, or prompts with completions.

Chats are rendered by the tokenizer's own template. A document is token ids with one flag a token: whether the token
belongs to the text that the model learns to produce (the completion, the assistant's turns, or all of a plain text).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from requant.errors import InputError

Format = Literal["auto", "text", "chat", "completion"]
Row = Mapping[str, Any]
TEXT_KEYS = ("text", "content")
CHAT_KEYS = ("messages", "conversations")
COMPLETION_KEYS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """Where rows of text are read from: exactly one of path, dataset (hub id) and builtin."""

    path: Path | None = None
    dataset: str | None = None
    builtin: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str | None = None
    documents: int | None = None

    def __str__(self) -> str:
        """The name shown in reports: of a local path only the file name."""
        if self.path:
            return self.path.name
        return self.builtin or ":".join(filter(None, (self.dataset, self.config, self.split)))


@dataclass(frozen=True, slots=True)
class TokenDocument:
    """A tokenized document.

    ids: without BOS. scored: one flag a token, True inside completions. n_bytes: of the flagged text in UTF-8.
    """

    ids: tuple[int, ...]
    scored: tuple[bool, ...]
    n_bytes: int


def read_rows(source: TextSource) -> list[Row]:
    """All rows of a source, or its first `documents`.

    Raises InputError when unreadable or empty.
    """
    if source.path is not None:
        rows = list(_file_rows(source.path))
    elif source.builtin is not None:
        from pydoc_data.topics import topics

        rows = [{"text": text} for _, text in sorted(topics.items())]
    else:
        rows = _hub_rows(source)
    if not rows:
        raise InputError(f"{source}: holds no rows")
    return rows[: source.documents]


def _file_rows(path: Path) -> Iterator[Row]:
    """Rows of one file; a .txt file is one document."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            yield from pq.read_table(path).to_pylist()
            return
        with path.open(encoding="utf-8-sig", newline="") as f:
            text = f.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if path.suffix == ".txt":
        yield from [{"text": text}] if text.strip() else []
    elif path.suffix == ".csv":
        yield from csv.DictReader(io.StringIO(text, newline=""))
    elif path.suffix == ".json":
        yield from _json_rows(path, text)
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield from _json_rows(path, line, number)


def _json_rows(path: Path, text: str, line: int | None = None) -> list[Row]:
    where = f"{path}:{line}" if line else str(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({error})") from error
    rows = value if isinstance(value, list) else [value]
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{where}: expected objects with columns, found {type(rows[0]).__name__}")
    return rows


def _hub_rows(source: TextSource) -> list[Row]:
    from datasets import load_dataset

    try:
        table = load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
    except (OSError, ValueError, ConnectionError) as error:
        raise InputError(f"dataset {source}: cannot be loaded: {error}") from error
    return list(table)


def row_format(source: TextSource, row: Row, asked: Format) -> Format:
    """The format of a source's rows; `auto` is resolved from the columns of its first row.

    Raises InputError, naming the columns found, when they do not fit the format.
    """
    columns = ", ".join(map(str, row)) or "none"
    if source.column is not None and source.column not in row:
        raise InputError(f"{source}: no column {source.column!r}; it has {columns}")
    if asked == "auto":
        asked = "text"
        if not source.column and _chat_key(row):
            asked = "chat"
        elif not source.column and _completion_keys(row):
            asked = "completion"
    if asked == "text" and not (source.column or any(k in row for k in TEXT_KEYS)):
        raise InputError(f"{source}: no text column ({' or '.join(TEXT_KEYS)}); it has {columns}: set data.column")
    if asked == "chat" and not (source.column or _chat_key(row)):
        raise InputError(f"{source}: no chat column ({' or '.join(CHAT_KEYS)}); it has {columns}: set data.column")
    if asked == "completion" and not _completion_keys(row):
        raise InputError(f"{source}: no prompt and completion columns; it has {columns}")
    return asked


def _chat_key(row: Row) -> str | None:
    return next((k for k in CHAT_KEYS if k in row), None)


def _completion_keys(row: Row) -> tuple[str, str] | None:
    return next((pair for pair in COMPLETION_KEYS if all(k in row for k in pair)), None)


def read_texts(source: TextSource) -> list[str]:
    """The text column of a source, for protocols that join texts before tokenizing."""
    rows = read_rows(source)
    row_format(source, rows[0], "text")
    key = source.column or next(k for k in TEXT_KEYS if k in rows[0])
    return [str(row[key]) for row in rows]


def tokenize(source: TextSource, tokenizer: Any, asked: Format = "auto") -> list[TokenDocument]:
    """Every row of a source as a document, except rows that render to no tokens.

    Raises InputError for columns or roles that do not fit the format, and when every row is empty.
    """
    rows = read_rows(source)
    kind = row_format(source, rows[0], asked)
    documents = []
    for number, row in enumerate(rows, 1):
        try:
            text, spans = _render(source, row, kind, tokenizer)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{source}: row {number} is not a {kind} row: {type(error).__name__} {error}") from error
        document = _encode(tokenizer, text, spans)
        if document.ids:
            documents.append(document)
    if not documents:
        raise InputError(f"{source}: every row is empty")
    return documents


def _render(source: TextSource, row: Row, kind: Format, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """(text, spans of it that count as completion)."""
    if kind == "text":
        key = source.column or next((k for k in TEXT_KEYS if k in row), TEXT_KEYS[0])
        text = str(row[key] or "")
        return text, [(0, len(text))]
    if kind == "chat":
        return _render_chat(row[source.column or _chat_key(row) or ""], tokenizer)
    pair = _completion_keys(row)
    if pair is None:
        raise ValueError("no prompt and completion columns")
    prompt = str(row[pair[0]]) + (f"\n{row['input']}" if row.get("input") else "")
    if tokenizer.chat_template:
        return _render_chat(
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": str(row[pair[1]])}],
            tokenizer,
        )
    return prompt + str(row[pair[1]]), [(len(prompt), len(prompt) + len(str(row[pair[1]])))]


def _render_chat(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """(text by the tokenizer's template, spans of the assistant's turns in it).

    A span reaches from the generation prompt to the end of the turn.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template")
    turns = [
        {"role": _ROLES[m.get("role") or m["from"]], "content": m["content"] if "content" in m else m["value"]}
        for m in messages
    ]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    spans = []
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(turns[:i], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(turns[: i + 1], tokenize=False)
        if not (text.startswith(before) and text.startswith(after.rstrip())):
            raise ValueError("the chat template rewrites earlier turns: the assistant's part cannot be located")
        spans.append((len(before), len(after)))
    return text, spans


def _encode(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]]) -> TokenDocument:
    """Tokenize the whole text at once; a token is flagged when it begins inside a span."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    bos = tokenizer.bos_token_id
    if adds_bos(tokenizer) and ids and ids[0] == bos:  # a template that writes BOS itself
        ids, offsets = ids[1:], offsets[1:]
    scored = tuple(any(start <= begin < stop for start, stop in spans) for begin, _ in offsets)
    return TokenDocument(tuple(ids), scored, sum(len(text[a:b].encode()) for a, b in spans))


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer adds BOS to a text by default."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
