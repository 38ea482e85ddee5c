"""Rows of a local file (txt, jsonl, json, csv, parquet, each also gzipped) or a hub dataset."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from requant.errors import InputError

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """Where rows of text are read from: exactly one of path, dataset (hub id) and builtin.

    ignore: columns that may be left out although they hold text.
    """

    path: Path | None = None
    dataset: str | None = None
    builtin: str | None = None
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str | None = None
    documents: int | None = None
    ignore: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The name shown in reports: of a local path only the file name."""
        if self.path:
            return self.path.name
        return self.builtin or ":".join(filter(None, (self.dataset, self.config, self.split)))

    @property
    def where(self) -> str:
        """The name shown in errors: of a local path all of it."""
        return str(self.path) if self.path else str(self)


def read_rows(source: TextSource) -> list[Row]:
    """All rows of a source, or its first `documents`.

    Raises InputError when unreadable or empty.
    """
    if source.path is not None:
        rows = list(_file_rows(source.path, source.split))
    elif source.builtin is not None:
        from pydoc_data.topics import topics

        rows = [{"text": text} for _, text in sorted(topics.items())]
    else:
        rows = _hub_rows(source)
    if not rows:
        raise InputError(f"{source.where}: holds no rows")
    return rows[: source.documents]


def _file_rows(path: Path, split: str) -> Iterator[Row]:
    """Rows of one file; a .txt file is one document."""
    gzipped = path.suffix == ".gz"
    kind = Path(path.stem).suffix if gzipped else path.suffix
    try:
        data = path.read_bytes()
        if gzipped:
            data = gzip.decompress(data)
        if kind == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            yield from map(_dense, pq.read_table(pa.BufferReader(data)).to_pylist())
            return
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if kind == ".txt":
        yield from [{"text": text}] if text.strip() else []
    elif kind == ".csv":
        yield from _csv_rows(path, text)
    elif kind == ".json":
        yield from _json_rows(path, text, split)
    else:
        yield from _json_lines(path, text)


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    """Rows of a csv file with a header; fields may have any length."""
    csv.field_size_limit(sys.maxsize)
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline=""), strict=True), 1):
            if None in row:
                raise InputError(
                    f"{path}: row {number} has more fields than the header: quote fields that contain commas"
                )
            yield row
    except csv.Error as error:
        raise InputError(f"{path}: not valid csv ({error})") from error


def _json_rows(path: Path, text: str, split: str) -> list[Row]:
    """Rows of one JSON value: a list of objects, an object of named lists, or JSON lines."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) > 1 and lines[0].lstrip().startswith("{") and lines[0].rstrip().endswith("}"):
            return list(_json_lines(path, text))
        raise InputError(f"{path}: not valid JSON ({error})") from error
    lists = {k: v for k, v in value.items() if _is_rows(v)} if isinstance(value, dict) else {}
    if lists and all(isinstance(v, list) for v in value.values()):
        if len(lists) > 1 and split not in lists:
            raise InputError(f"{path}: holds several lists of rows, {', '.join(lists)}, and none is called {split!r}")
        value = lists[split] if split in lists else next(iter(lists.values()))
    return _objects(str(path), value if isinstance(value, list) else [value])


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{number}: not valid JSON ({error})") from error
            yield from _objects(f"{path}:{number}", value if isinstance(value, list) else [value])


def _objects(where: str, rows: list[Any]) -> list[Row]:
    other = next((row for row in rows if not isinstance(row, dict)), None)
    if other is not None or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{where}: expected objects with columns, found {type(other).__name__}")
    return rows


def _hub_rows(source: TextSource) -> list[Row]:
    from datasets import load_dataset

    try:
        table = load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
    except (OSError, ValueError, ConnectionError) as error:
        raise InputError(f"dataset {source}: cannot be loaded: {error}") from error
    return [_dense(row) for row in table]


def _dense(row: Row) -> Row:
    """Without nulls inside nested objects: typed columns fill up the keys that an object lacks."""
    return {k: _without_null(v) if isinstance(v, list | dict) else v for k, v in row.items()}


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_null(v) for k, v in value.items() if v is not None}
    return [_without_null(v) for v in value] if isinstance(value, list) else value
