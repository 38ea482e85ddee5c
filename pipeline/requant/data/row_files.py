"""Rows of a local file (txt, jsonl, json, csv, parquet, each also gzipped) or a hub dataset."""

from __future__ import annotations

import csv
import io
import sys
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, AnyStr

from requant.data.text_files import LARGEST, open_data
from requant.errors import InputError, library_call
from requant.outgoing import masked
from requant_eval.strict_json import MOST, JsonError, parse, values_in

Row = Mapping[str, Any]
MOST_ROWS = 3_000_000  # a row takes some hundred bytes, whatever it holds
MOST_LINES = 15_000_000  # that are looked at, empty ones too: seconds
PARQUET_ROWS = 128  # read at a time
ROW_BYTES = 200  # of a row in memory, besides its text
HUB_SECONDS = 5  # in which a hub has to answer at all
OTHER_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")


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
        rows = list(islice(_file_rows(source.path, source.split), min(MOST_ROWS, source.documents or MOST_ROWS)))
        if len(rows) == MOST_ROWS:
            raise InputError(f"{source.where}: more than {MOST_ROWS:,} rows: set data.documents to use the first ones")
    elif source.builtin is not None:
        from pydoc_data.topics import topics

        rows = [{"text": text} for _, text in sorted(topics.items())]
    else:
        rows = _hub_rows(source)
    if not rows:
        raise InputError(f"{source.where}: holds no rows")
    return rows[: source.documents]


def _file_rows(path: Path, split: str) -> Iterator[Row]:
    """Rows of one file, read as they are asked for; a .txt file is one document."""
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    with open_data(path) as file:
        if kind == ".parquet":
            yield from _parquet_rows(path, file.read())
            return
        if file.peek(len(BOM_UTF8)).startswith(BOM_UTF8):
            file.read(len(BOM_UTF8))
        if kind == ".csv":
            yield from _csv_rows(path, file)
        elif kind not in (".txt", ".json"):
            yield from _json_lines(path, file)
        else:
            text = _decoded(path, file.read())
            if kind == ".json":
                yield from _json_rows(path, text, split)
            elif text.strip():
                yield {"text": text}


def _decoded(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read: not UTF-8 text ({error.reason} at byte {error.start})") from error


def _parquet_rows(path: Path, data: bytes) -> Iterator[Row]:
    """Rows of a parquet file, some at a time: what a small file describes may be of any size."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    left = LARGEST
    with library_call(f"{path}: cannot be read", passing=(MemoryError,)):
        for batch in pq.ParquetFile(pa.BufferReader(data)).iter_batches(batch_size=PARQUET_ROWS):
            left -= batch.nbytes + ROW_BYTES * batch.num_rows
            if left < 0:
                raise InputError(
                    f"{path}: its rows are larger than {LARGEST / 1e9:.0f} GB: make a file of those needed"
                )
            yield from map(_dense, batch.to_pylist())


def _csv_rows(path: Path, file: io.BufferedReader) -> Iterator[Row]:
    """Rows of a csv file with a header; fields may have any length."""
    csv.field_size_limit(sys.maxsize)
    number = 0
    try:
        reader = csv.DictReader(_lines(path, io.TextIOWrapper(file, "utf-8", newline="")), strict=True)
        twice = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]
        if twice:
            raise InputError(f"{path}: column {twice[0]!r} is named twice in the header")
        for number, row in enumerate(reader, 1):
            if None in row:
                raise InputError(
                    f"{path}: row {number} has more fields than the header: quote fields that contain commas"
                )
            yield {k: v or None for k, v in row.items()}  # csv has no null: an empty cell is one
    except csv.Error as error:
        raise InputError(f"{path}: not valid csv after row {number} ({error})") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read: not UTF-8 text ({error.reason}) after row {number}") from error


def _json_rows(path: Path, text: str, split: str) -> list[Row]:
    """Rows of one JSON value: a list of objects, an object of named lists, or JSON lines."""
    try:
        value = parse(text, constants=True)
    except JsonError as error:
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) > 1 and lines[0].lstrip().startswith("{") and lines[0].rstrip().endswith("}"):
            return list(_json_lines(path, io.BytesIO(text.encode())))
        place = f"{path}:{error.line}" if error.line else str(path)
        raise InputError(f"{place}: {error}") from error
    return _objects(str(path), _rows_in(path, value, split))


def _rows_in(path: Path, value: Any, split: str) -> list[Any]:
    """Rows in a JSON value: itself, one of its named lists of rows, or its columns."""
    if not isinstance(value, dict) or not value or not all(isinstance(v, list) for v in value.values()):
        return value if isinstance(value, list) else [value]
    if not any(map(_is_rows, value.values())):
        lengths = {len(column) for column in value.values()}
        if len(lengths) > 1:
            raise InputError(f"{path}: its columns have {' and '.join(map(str, sorted(lengths)))} rows")
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if split in value:
        return list(value[split])
    named = [k for k, v in value.items() if _is_rows(v)]
    if len(named) == 1 and split == "train" and named[0] not in OTHER_SPLITS:
        return list(value[named[0]])
    raise InputError(f"{path}: holds rows under {', '.join(value)}, and none is called {split!r}: set data.split")


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _lines(path: Path, lines: Iterable[AnyStr]) -> Iterator[AnyStr]:
    """The lines of a file, as many as can be meant: a file of line ends alone would take minutes."""
    left = iter(lines)
    yield from islice(left, MOST_LINES)
    if next(left, None) is not None:
        raise InputError(f"{path}: more than {MOST_LINES:,} lines: set data.documents to use the first ones")


def _json_lines(path: Path, lines: Iterable[bytes]) -> Iterator[Row]:
    left = MOST if path.suffix == ".gz" else None  # the size of others says what they may hold
    for number, line in enumerate(_lines(path, lines), 1):
        if not line.strip():
            continue
        if left is not None and (left := left - values_in(line)) < 0:
            raise InputError(
                f"{path}: more than {MOST:,} values: set data.documents to use the first ones, or unpack it"
            )
        try:
            value = parse(line, constants=True)
        except JsonError as error:
            raise InputError(f"{path}:{number}: {error}") from error
        yield from _objects(f"{path}:{number}", value if isinstance(value, list) else [value])


def _objects(where: str, rows: list[Any]) -> list[Row]:
    other = next((row for row in rows if not isinstance(row, dict)), None)
    if other is not None or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{where}: expected objects with columns, found {type(other).__name__}")
    return rows


def _hub_rows(source: TextSource) -> list[Row]:
    """Rows of a hub dataset: from the cache alone where the hub does not answer, which is asked once and shortly."""
    import datasets

    silent = _why_no_hub()
    before = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = (
            before or silent is not None
        )  # else the library tries again for most of a minute
        table = datasets.load_dataset(source.dataset, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # the library raises what it likes; the cause says more
        reason = " ".join(masked(str(error.__cause__ or error)).split())[:300]
        if silent is not None:
            reason = f"not in the cache of this machine, and {silent}"
        raise InputError(
            f"dataset {source}: cannot be loaded: {reason}. A local file is given as data: {{path: ...}}"
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = before
    return [_dense(row) for row in table]


def _why_no_hub() -> str | None:
    """Why the hub cannot be asked; None: it answers, whatever it says."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except OfflineModeIsEnabled:
        return "the hub is not asked, since HF_HUB_OFFLINE is set"
    except (HTTPError, OSError) as error:
        return f"the hub does not answer ({type(error).__name__})"
    return None


def _dense(row: Row) -> Row:
    """Without nulls inside nested objects: typed columns fill up the keys that an object lacks."""
    return {k: _without_null(v) if isinstance(v, list | dict) else v for k, v in row.items()}


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_null(v) for k, v in value.items() if v is not None}
    return [_without_null(v) for v in value] if isinstance(value, list) else value
