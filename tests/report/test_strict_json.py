"""JSON of strangers: what `json` takes silently or dies of, and what models really hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from requant_eval import strict_json
from requant_eval.strict_json import DEEPEST, JsonError, depth, load, parse


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), "more than 100 levels"),
        (b'{"a":' * 900 + b"1" + b"}" * 900, "nested too deeply"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there twice"),
        (b"[NaN]", "NaN"),
        (b"[1e999]", "1e999"),
        (b"[-Infinity]", "-Infinity"),
        (b"[" + b"9" * 5000 + b"]", "5000 digits"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        ("{}".encode("utf-16"), "not UTF-8"),
        (b'["\xff"]', "not UTF-8"),
        (b'["\\ud800"]', "surrogate"),
        (b'{"\\uDC00x": 1}', "surrogate"),
        (b"{} {}", "not valid JSON"),
        (b'["\n"]', "not valid JSON"),
    ],
)
def test_what_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(JsonError, match=says):
        parse(text)


def test_what_real_files_hold_is_read() -> None:
    longest = 1000000000000000019884624838656  # model_max_length of many a tokenizer_config.json
    value = {"a": [longest, 1e-8, None, True, "\U0001f600"], "b": {"a": {}}}
    assert parse(json.dumps(value)) == value  # the emoji is written as a pair of surrogates
    assert parse("[" * DEEPEST + "]" * DEEPEST)
    assert parse('{"time_step_limit": [0.0, Infinity]}', constants=True) == {"time_step_limit": [0.0, float("inf")]}


def test_traps_are_looked_for_where_they_are() -> None:
    """Digits and brackets inside a text, and many flat lists, are none."""
    for value in ("9" * 5000, "[" * 500, [[]] * 500, "\\ud800 written out", 10**100):
        assert parse(json.dumps(value)) == value
    with pytest.raises(JsonError, match="digits"):
        parse(json.dumps(["9" * 5000, -(10**308)]))


def test_a_byte_order_mark_where_people_write() -> None:
    assert parse(b"\xef\xbb\xbf[1]", bom=True) == [1]


def test_the_line_is_known() -> None:
    for text in (b'{\n"a": 1,\n"b" 2}', b'{\n"a": 1,\n"\xff": 2}'):
        with pytest.raises(JsonError) as raised:
            parse(text)
        assert raised.value.line == 3


def test_depth_counts_no_further_than_it_is_asked() -> None:
    assert [depth(v, 9) for v in (1, [], {"a": 1}, [[1], {"a": [2]}])] == [0, 1, 1, 3]
    assert depth(json.loads("[" * 500 + "]" * 500), 9) == 10


def test_only_regular_files_of_a_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_text('"' + "x" * 100 + '"')
    for name, says in (("pipe", "pipe"), ("large", "102 bytes"), ("", "directory"), ("a\0b", "name")):
        with pytest.raises(JsonError, match=says):
            load(tmp_path / name, largest=100)
    with pytest.raises(JsonError, match="device"):
        load(Path("/dev/zero"))
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")
    (tmp_path / "link").symlink_to(tmp_path / "large")
    assert load(tmp_path / "link") == "x" * 100


@pytest.mark.parametrize(
    "text", ["[" + "[]," * 10**4 + "1]", '{"a":[' + '"x",' * 10**4 + '""]}', "[" + "1," * 10**4 + "1]"]
)
def test_more_values_than_memory_can_be_meant_for(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A hundred megabytes of `[],` would take three gigabytes."""
    monkeypatch.setattr(strict_json, "MOST", 1000)
    with pytest.raises(JsonError, match="more than 1,000 values"):
        parse(text)


@pytest.mark.parametrize("end", ['"', "", '\\"', "\\"])
def test_commas_and_brackets_in_texts_are_no_values(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr(strict_json, "MOST", 1000)
    text = '"' + '[{,\\"' * 10**5 + end  # also quickly where the text does not end
    if end == '"':
        assert parse(text) == '[{,"' * 10**5
    else:
        with pytest.raises(JsonError, match="not valid JSON"):
            parse(text)
