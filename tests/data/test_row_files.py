"""`requant.data.row_files`: file kinds, and errors that name file and line."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from requant.data import row_files, text_files
from requant.data.row_files import TextSource, read_rows
from requant.data.text_files import LARGEST_PACKED
from requant.errors import InputError
from requant_eval import strict_json

ROWS = [{"text": "a b"}, {"text": "c\u2028d"}]


def read(path: Path, data: str | bytes, **options: Any) -> list[Any]:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return [dict(row) for row in read_rows(TextSource(path=path, **options))]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.json", json.dumps(ROWS)),
        ("lines.json", lines(ROWS)),
        ("named.json", json.dumps({"train": ROWS})),
        ("a.jsonl.gz", gzip.compress(lines(ROWS).encode(), mtime=0)),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("bom.jsonl", "\ufeff" + lines(ROWS)),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, data: str | bytes) -> None:
    assert read(tmp_path / name, data) == ROWS


def test_of_several_lists_the_split_is_read(tmp_path: Path) -> None:
    data = json.dumps({"train": ROWS, "test": ROWS[:1]})
    assert read(tmp_path / "a.json", data, split="test") == ROWS[:1]
    with pytest.raises(InputError, match=r"holds rows under train, test, and none is called 'dev': set data.split"):
        read(tmp_path / "a.json", data, split="dev")


def test_another_split_is_not_taken_for_the_one_asked(tmp_path: Path) -> None:
    for data, split in (
        ({"train": ROWS}, "test"),
        ({"test": ROWS}, "train"),
        ({"train": [], "validation": ROWS}, "test"),
    ):
        with pytest.raises(InputError, match=f"none is called '{split}'"):
            read(tmp_path / "a.json", json.dumps(data), split=split)
    assert read(tmp_path / "a.json", json.dumps({"data": ROWS})) == ROWS
    with pytest.raises(InputError, match="holds no rows"):
        read(tmp_path / "a.json", json.dumps({"train": [], "test": ROWS}))


def test_columns_of_equal_length_are_rows(tmp_path: Path) -> None:
    data = {"instruction": ["a", "b"], "output": ["c", "d"]}
    assert read(tmp_path / "a.json", json.dumps(data)) == [
        {"instruction": "a", "output": "c"},
        {"instruction": "b", "output": "d"},
    ]
    with pytest.raises(InputError, match="its columns have 1 and 2 rows"):
        read(tmp_path / "a.json", json.dumps(data | {"output": ["c"]}))


def test_an_empty_cell_of_a_csv_is_null(tmp_path: Path) -> None:
    assert read(tmp_path / "a.csv", "a,b\nx,\n") == [{"a": "x", "b": None}]
    with pytest.raises(InputError, match="column 'a' is named twice in the header"):
        read(tmp_path / "a.csv", "a,a\nx,y\n")


def test_a_single_object_is_one_row(tmp_path: Path) -> None:
    assert read(tmp_path / "a.json", '{"messages": [{"role": "user", "content": "a"}], "n": 1}') == [
        {"messages": [{"role": "user", "content": "a"}], "n": 1}
    ]


def test_a_field_of_a_csv_may_have_any_length(tmp_path: Path) -> None:
    long = "x" * 200_000
    assert read(tmp_path / "a.csv", f"text,n\n{long},1\n") == [{"text": long, "n": "1"}]


def test_a_csv_row_with_too_many_fields_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.csv: row 2 has more fields than the header"):
        read(tmp_path / "a.csv", "text\nx\ny,z\n")


def test_typed_columns_do_not_add_keys(tmp_path: Path) -> None:
    """Arrow gives every object all keys of its column; those that a row does not have are null."""
    calls = [{"role": "assistant", "calls": [{"city": "x"}]}, {"role": "user", "calls": [{"zip": 1}]}]
    pq.write_table(pa.Table.from_pylist([{"messages": calls, "note": None}]), tmp_path / "a.parquet")
    assert [dict(r) for r in read_rows(TextSource(path=tmp_path / "a.parquet"))] == [{"messages": calls, "note": None}]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl:2: not valid JSON"),
        ("a.json", '{"a": 1', r"a\.json:1: not valid JSON"),
        ("a.json", "[" * 100_000, r"a\.json: nested too deeply"),
        ("lines.json", '{"a": 1}\n{"a" 2}\n', r"lines\.json:2: not valid JSON"),
        ("a.json", "[1]", r"a\.json: expected objects with columns, found int"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"x" * 1000, mtime=0)[:-10], r"a\.jsonl\.gz: cannot be read"),
        ("a.parquet", b"no parquet", r"a\.parquet: cannot be read"),
        ("a.csv", 'text\n"x', r"a\.csv: not valid csv"),
        ("a.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', r"a\.jsonl:2: 'a' is there twice"),
        ("a.jsonl", '{"a": ' + "9" * 5000 + "}", r"a\.jsonl:1: a number of 5000 digits"),
        ("a.jsonl", '{"a": ' + "[" * 5000 + "]" * 5000 + "}", r"a\.jsonl:1: nested too deeply"),
        ("a.jsonl", b'{"a": "\xff"}', r"a\.jsonl:1: not UTF-8 text"),
        ("a.csv", b"text\nx\n\xff", r"a\.csv: cannot be read: not UTF-8 text"),
        ("a.txt", b"\xff", r"a\.txt: cannot be read: not UTF-8 text"),
        (
            "a.jsonl.gz",
            gzip.compress(b" " * (LARGEST_PACKED + 1), mtime=0),
            r"a\.jsonl\.gz: unpacks to more than 100 MB",
        ),
        ("a.jsonl", "", "holds no rows"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, data: str | bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path / name, data)


@pytest.mark.parametrize(
    ("name", "row"),
    [("a.jsonl.gz", b'{"text": "a b c"}\n'), ("a.csv.gz", b"a b c\n"), ("a.jsonl", b'{"text": "a b c"}\n')],
)
def test_only_what_is_needed_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, row: bytes
) -> None:
    """A large file gives its first documents in little memory, and none where all would be read."""
    data = (b"text\n" if "csv" in name else b"") + row * 2 * (10**6 // len(row))
    monkeypatch.setattr(text_files, "LARGEST_PACKED", 10**6)
    monkeypatch.setattr(text_files, "LARGEST", 10**6)
    data = gzip.compress(data) if name.endswith(".gz") else data
    assert read(tmp_path / name, data, documents=2) == [{"text": "a b c"}] * 2
    with pytest.raises(InputError, match=r"(unpacks to more than 1 MB|is larger than 0 GB): set data\.documents"):
        read(tmp_path / name, data)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_small_files_of_millions_of_values_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(row_files, "MOST", 100)
    monkeypatch.setattr(strict_json, "MOST", 100)
    many = b'{"text": [' + b"[]," * 60 + b"1]}"
    with pytest.raises(InputError, match=rf"{name}\.gz: more than 100 values"):
        read(tmp_path / f"{name}.gz", gzip.compress(many))
    text = {"text": 'He said "[' + "[{,\\" * 30}  # in a text they are no values
    assert read(tmp_path / "b.json.gz", gzip.compress(json.dumps([text]).encode())) == [text]


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    for name, data in (("a.jsonl", lines(ROWS)), ("a.json", json.dumps(ROWS)), ("a.txt", "x"), ("a.csv", "text\nx\n")):
        rows = read(tmp_path / name, b"\xef\xbb\xbf" + data.encode())
        assert rows == (ROWS if "json" in name else [{"text": "x"}])


def test_only_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "folder.jsonl").mkdir()
    for name, found in (("pipe", "a device or a pipe"), ("zero", "a device or a pipe"), ("folder", "a directory")):
        with pytest.raises(InputError, match=rf"{name}\.jsonl: cannot be read: {found}, expected a file"):
            read_rows(TextSource(path=tmp_path / f"{name}.jsonl"))
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    assert read_rows(TextSource(path=tmp_path / "link.jsonl")) == ROWS


def test_the_first_documents_are_read_of_what_has_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "MOST_ROWS", 3)
    data = lines([{"text": str(i)} for i in range(9)]) + "no JSON"
    with pytest.raises(InputError, match=r"more than 3 rows: set data\.documents"):
        read(tmp_path / "a.jsonl", data)
    assert read(tmp_path / "a.jsonl", data, documents=2) == [{"text": "0"}, {"text": "1"}]


def test_a_small_parquet_file_of_much_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "LARGEST", 10**6)
    pq.write_table(pa.table({"text": ["x" * 1000] * 3000}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 10**4
    with pytest.raises(InputError, match="its rows are larger than"):
        read_rows(TextSource(path=tmp_path / "a.parquet"))


def test_a_large_file_of_plain_text_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text packs to a third or a tenth, and what it unpacks to is as far above the limit as its own size allows."""
    monkeypatch.setattr(text_files, "LARGEST_PACKED", 1000)
    rows = [{"text": hashlib.sha256(b"%d" % i).hexdigest()} for i in range(500)]
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    assert len(data) > 30 * 1000
    assert read(tmp_path / "a.jsonl.gz", gzip.compress(data)) == rows
    with pytest.raises(InputError, match=r"unpacks to more than 0 MB"):
        read(tmp_path / "b.jsonl.gz", gzip.compress(json.dumps({"text": "x" * 10**5}).encode()))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz", "a.csv.gz"])
def test_a_file_of_line_ends_is_not_read_for_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(row_files, "MOST_LINES", 10)
    first = b'{"text": "a"}\n' if "jsonl" in name else b"text\na\n"
    for count, fits in ((8, True), (20, False)):
        data = first + b"\n" * count
        file, data = tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data
        if fits:
            assert read(file, data) == [{"text": "a"}]
        else:
            with pytest.raises(InputError, match=rf"{name}: more than 10 lines: set data\.documents"):
                read(file, data)


# --- the hub ---


class Silent(BaseHTTPRequestHandler):
    """A hub that answers every question with "not found"."""

    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture
def asked_offline(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Stands in for the library: whether it was told that there is no network, for each call."""
    told: list[bool] = []

    def load_dataset(*_: Any, **__: Any) -> Any:
        told.append(datasets.config.HF_HUB_OFFLINE)
        raise ValueError("what the library says")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    return told


def refused(dataset: str) -> str:
    with pytest.raises(InputError) as error:
        read_rows(TextSource(dataset=dataset, config="c", split="s"))
    huggingface_hub.close_session()
    return str(error.value)


def test_a_hub_that_is_out_of_reach_is_asked_once(asked_offline: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert refused("owner/name") == (
            "dataset owner/name:c:s: cannot be loaded: not in the cache of this machine, and the hub does not answer "
            "(ConnectError). A local file is given as data: {path: ...}"
        )
    assert asked_offline == [True]
    assert datasets.config.HF_HUB_OFFLINE is False


def test_offline_mode_is_named(asked_offline: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "and the hub is not asked, since HF_HUB_OFFLINE is set" in refused("owner/name")
    assert asked_offline == [True]


def test_of_a_hub_that_answers_the_library_says_what_is_wrong(
    asked_offline: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
        said = refused("owner/name")
        server.shutdown()
        thread.join()
    assert "cannot be loaded: what the library says." in said
    assert asked_offline == [False]


def test_a_dataset_that_nobody_has_is_refused_by_the_library_without_a_network() -> None:
    """The tests' own environment: HF_HUB_OFFLINE is set."""
    assert "not in the cache of this machine" in refused("requant/no-such-dataset")
