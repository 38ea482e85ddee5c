"""Long texts, tokenized part by part: the tokens are those of the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import chat

from requant.data import long_texts
from requant.data.documents import tokenize
from requant.data.row_files import TextSource
from requant.errors import InputError

LINES = "\n".join(f"line {i} of a text,  with <user> in it{chr(10) * (i % 3)}" for i in range(400))

ONE_LINE = LINES.replace("\n", " ")


def whole(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


class Counting:
    """A tokenizer that knows the longest text it was given. prefix: what it writes before every text."""

    def __init__(self, prefix: str = "") -> None:
        self.inner, self.prefix, self.longest = chat.tokenizer(), prefix, 0

    def __call__(self, text: str, **options: Any) -> Any:
        self.longest = max(self.longest, len(text))
        return self.inner(self.prefix + text, **options)


@pytest.mark.parametrize(
    "text", ["", "a", LINES, LINES * 3, "\n" * 5000, "no line end" * 900, ONE_LINE, ONE_LINE + LINES]
)
def test_parts_have_the_tokens_of_the_whole(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PART", 1000)
    monkeypatch.setattr(long_texts, "AROUND", 100)
    tokenizer = chat.tokenizer()
    assert long_texts.encode(tokenizer, text) == whole(tokenizer, text)


@pytest.mark.parametrize("text", [LINES, ONE_LINE])
def test_a_long_text_is_cut(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PART", 1000)
    monkeypatch.setattr(long_texts, "AROUND", 100)
    tokenizer = Counting()
    assert long_texts.encode(tokenizer, text) == whole(tokenizer.inner, text)
    assert tokenizer.longest < 2500 < len(text)


def test_what_begins_every_text_with_a_mark_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PART", 1000)
    monkeypatch.setattr(long_texts, "AROUND", 100)
    tokenizer = Counting(prefix="_")
    assert long_texts.encode(tokenizer, LINES)[0] == whole(tokenizer.inner, "_" + LINES)[0]
    assert tokenizer.longest == len(LINES)


def test_a_word_without_an_end_is_refused_by_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 MB of one letter took 5.8 GB and a minute."""
    monkeypatch.setattr(long_texts, "LONGEST_WORD", 50)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a " * 80, "b" * 50 + " " + "c" * 50)))
    assert len(tokenize(TextSource(path=texts), chat.tokenizer())) == 2
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a " * 80, "b " + "c" * 51)))
    with pytest.raises(InputError, match=r"texts.jsonl: row 2 .*: holds 51 characters without a blank or line end, at"):
        tokenize(TextSource(path=texts), chat.tokenizer())
