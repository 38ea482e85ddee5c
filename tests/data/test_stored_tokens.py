"""`requant.data.stored_tokens`: what tokenizing gives, as long as nothing has changed."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.e2e import texts, write_rows

from requant import outgoing
from requant.data import stored_tokens, tokenizer
from requant.data.documents import TextSource, TokenDocument, tokenize
from requant.data.stored_tokens import PREFIX, StoredTokens, code_digest
from requant.run.shared_inputs import SharedInputs


@pytest.fixture
def loaded(source: Path) -> Any:
    return tokenizer.load(source)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_rows(tmp_path / "a.jsonl", [{"text": text} for text in [*texts()["train"][:5], None, "é ∑ 文"]])
    return tmp_path / "a.jsonl"


def read(folder: Path, source: TextSource, loaded: Any, **options: Any) -> tuple[list[TokenDocument], list[str], int]:
    """(documents, notes, how many sources were tokenized), as a run does it."""
    stored, notes = StoredTokens(folder), list[str]()
    inputs = SharedInputs(stored)
    documents = inputs.tokenize(source, loaded, options.pop("asked", "auto"), notes=notes, **options)
    count = len(stored.made)
    stored.save()
    return documents, notes, count


def test_the_second_time_they_come_from_the_disk(tmp_path: Path, file: Path, loaded: Any) -> None:
    source, told = TextSource(path=file), list[str]()
    wanted = tokenize(source, loaded, notes=told)
    assert read(tmp_path / "cache", source, loaded) == (wanted, told, 1)
    assert told, "a note is kept too: a row is empty"
    assert read(tmp_path / "cache", source, loaded) == (wanted, told, 0)
    moved = tmp_path / "other" / "a.jsonl"
    moved.parent.mkdir()
    shutil.copy(file, moved)
    assert read(tmp_path / "cache", TextSource(path=moved), loaded) == (wanted, told, 0)


def test_flags_ends_and_bytes_are_kept(tmp_path: Path, loaded: Any) -> None:
    rows = [{"prompt": "What is it? ", "completion": f"A test, number {i}, of {'many ' * i}."} for i in range(9)]
    write_rows(tmp_path / "a.jsonl", rows)
    source = TextSource(path=tmp_path / "a.jsonl")
    wanted = tokenize(source, loaded)
    assert any(not all(document.scored) for document in wanted)
    for tokenized in (1, 0):
        assert read(tmp_path / "cache", source, loaded)[::2] == (wanted, tokenized)
    everything = tokenize(source, loaded, completions=False)
    assert read(tmp_path / "cache", source, loaded, completions=False)[::2] == (everything, 1), "asked for otherwise"


@pytest.mark.parametrize("change", ["text", "same size and time", "documents", "format", "column"])
def test_what_changed_is_tokenized_again(tmp_path: Path, file: Path, loaded: Any, change: str) -> None:
    source, asked = TextSource(path=file), "auto"
    read(tmp_path / "cache", source, loaded)
    if change == "text":
        file.write_text(file.read_text() + json.dumps({"text": "more"}) + "\n")
    elif change == "same size and time":
        before, content = file.stat(), file.read_bytes()
        file.write_bytes(content.replace(b" the ", b" eht "))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_size == before.st_size
    elif change == "documents":
        source = TextSource(path=file, documents=2)
    elif change == "column":
        source = TextSource(path=file, column="text")
    else:
        asked = "text"
    wanted = tokenize(source, loaded, "text")
    assert read(tmp_path / "cache", source, loaded, asked=asked)[::2] == (wanted, 1)


@pytest.mark.parametrize("change", ["tokenizer", "date", "code", "libraries"])
def test_another_tokenizer_or_other_code_tokenizes_again(
    tmp_path: Path, file: Path, source: Path, loaded: Any, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = TextSource(path=file)
    read(tmp_path / "cache", text, loaded)
    other = loaded
    if change == "tokenizer":
        shutil.copytree(source, tmp_path / "model")
        (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
        other = tokenizer.load(tmp_path / "model")
    elif change == "date":
        other = tokenizer.load(source, date=datetime.date(2020, 1, 2))
    elif change == "code":
        monkeypatch.setattr(stored_tokens, "code_digest", lambda: "another")
    else:
        code_digest.cache_clear()
        monkeypatch.setattr(stored_tokens, "version", lambda name: "99")
    assert read(tmp_path / "cache", text, other)[2] == 1
    code_digest.cache_clear()


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "a directory"])
def test_a_damaged_file_is_no_file(tmp_path: Path, file: Path, loaded: Any, damage: str) -> None:
    wanted = read(tmp_path / "cache", TextSource(path=file), loaded)
    (kept,) = (tmp_path / "cache").iterdir()
    content = bytearray(kept.read_bytes())
    if damage == "a bit":
        content[-3] ^= 1
        kept.write_bytes(content)
    elif damage == "a directory":
        kept.unlink()
        kept.mkdir()
    else:
        kept.write_bytes(content[:-7] if damage == "cut" else b"")
    assert read(tmp_path / "cache", TextSource(path=file), loaded) == wanted
    assert kept.is_file()


def test_files_of_other_texts_do_not_pile_up(tmp_path: Path, file: Path, loaded: Any) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "scores.safetensors").write_text("another's")
    for text in ("one", "two", "three"):
        write_rows(file, [{"text": text}])
        read(tmp_path / "cache", TextSource(path=file), loaded)
    names = sorted(f.name for f in (tmp_path / "cache").iterdir())
    assert len(names) == 2
    assert names[0] == "scores.safetensors"
    assert names[1].startswith(PREFIX)


def test_text_of_the_hub_and_of_python_is_not_kept(tmp_path: Path, loaded: Any) -> None:
    stored = StoredTokens(tmp_path)
    assert stored.name(TextSource(builtin="python-reference"), loaded, "auto", completions=True) is None
    assert stored.name(TextSource(path=tmp_path / "none.txt"), loaded, "auto", completions=True) is None


def test_a_text_that_changes_meanwhile_is_not_kept(
    tmp_path: Path, file: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(source: TextSource, *arguments: Any, **options: Any) -> list[TokenDocument]:
        documents = tokenize(source, *arguments, **options)
        write_rows(file, [{"text": "another"}])
        return documents

    monkeypatch.setattr("requant.run.shared_inputs.tokenize", slow)
    read(tmp_path / "cache", TextSource(path=file), loaded)
    assert not (tmp_path / "cache").exists()


def test_notes_with_secrets_are_not_kept(tmp_path: Path, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "shared", lambda text: text.replace("hunter2", "***"))
    write_rows(tmp_path / "hunter2.jsonl", [{"text": "one"}, {"text": None}])
    _, notes, _ = read(tmp_path / "cache", TextSource(path=tmp_path / "hunter2.jsonl"), loaded)
    assert "hunter2" in notes[0]
    assert not (tmp_path / "cache").exists()
