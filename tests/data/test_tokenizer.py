"""`requant.data.tokenizer`: files as bases have them, BOS where the model needs it, errors."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from helpers import chat

from requant.data import tokenizer as tokenizer_files
from requant.data.documents import TextSource, tokenize
from requant.data.tokenizer import adds_bos
from requant.errors import InputError


def base(path: Path, model_type: str = "llama", template: str | None = None) -> Path:
    """A model directory with the tokenizer of characters, which adds no BOS."""
    made = chat.tokenizer(template)
    made.save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


def sentencepiece_model() -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[no-untyped-call]
        sentence_iterator=iter(["the quick brown fox", "jumps over the lazy dog"] * 20),
        model_writer=out,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return out.getvalue()


def test_a_sentencepiece_model_alone_is_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    names = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | {"add_bos_token": True, "legacy": False}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    made = tokenizer_files.load(tmp_path)
    own = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())  # type: ignore[no-untyped-call]
    for text in ("the lazy fox", "dog  dog", "naïve"):
        assert made(text, add_special_tokens=False)["input_ids"] == own.encode(text)
    assert adds_bos(made)


@pytest.mark.parametrize("model_type", ["gemma", "gemma2", "gemma3_text", "gemma3"])
def test_gemma_gets_bos_although_its_tokenizer_adds_none(tmp_path: Path, model_type: str) -> None:
    made = tokenizer_files.load(base(tmp_path, model_type))
    assert made("a")["input_ids"] != [made.bos_token_id, *made("a", add_special_tokens=False)["input_ids"]]
    assert adds_bos(made)
    assert "is put before every text" in tokenizer_files.notes(made, chat=False)[0]


def test_bos_that_only_the_template_writes_is_told(tmp_path: Path) -> None:
    made = tokenizer_files.load(base(tmp_path, template="{{ bos_token }}" + chat.ECHO))
    assert not adds_bos(made)
    (tmp_path / "t.jsonl").write_text('{"text": "abc"}\n')
    notes: list[str] = []
    (document,) = tokenize(TextSource(path=tmp_path / "t.jsonl"), made, notes=notes)
    assert made.decode(document.ids) == "abc"
    assert notes == [tokenizer_files.notes(made, chat=False)[0]]
    assert "plain texts are read without <s> (BOS)" in notes[0]
    assert tokenizer_files.notes(made, chat=True) == []
    assert tokenizer_files.notes(tokenizer_files.load(base(tmp_path / "plain", template=chat.ECHO)), chat=False) == []


def test_a_mark_of_every_turn_is_no_bos(tmp_path: Path) -> None:
    """SmolLM2 calls <|im_start|> its bos_token."""
    made = tokenizer_files.load(base(tmp_path, template=chat.ECHO.replace("<{{ m.role }}>", "<s>{{ m.role }}")))
    assert tokenizer_files.notes(made, chat=False) == []


def test_the_date_of_a_template_is_told_with_chats(tmp_path: Path) -> None:
    made = tokenizer_files.load(base(tmp_path, template=chat.DATED))
    (note,) = tokenizer_files.notes(made, chat=True)
    assert "is given 2024-07-26" in note
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (document,) = tokenize(TextSource(path=tmp_path / "t.jsonl"), made)
    assert made.decode(document.ids).startswith("26 Jul 2024<user>")


def test_settings_of_a_wrong_type_that_show_at_the_first_text(tmp_path: Path) -> None:
    base(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": "x"}))
    with pytest.raises(InputError, match=r"tokenizer\.json: transformers cannot load the tokenizer .*TypeError"):
        tokenizer_files.load(tmp_path)


def test_a_vocabulary_without_unknown_tokens(tmp_path: Path) -> None:
    """WordPiece without [UNK] takes the letter a, and no text with a letter that it lacks."""
    base(tmp_path)
    settings = json.loads((tmp_path / "tokenizer.json").read_text())
    pieces = {"[UNK]x": 0, "a": 1}
    settings |= {"model": {"type": "WordPiece", "vocab": pieces, "unk_token": "[UNK]", "max_input_chars_per_word": 9}}
    settings["added_tokens"] = []
    settings["model"]["continuing_subword_prefix"] = "##"
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"tokenizer\.json: transformers cannot load the tokenizer .*UNK"):
        tokenizer_files.load(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[1]", "not json", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    base(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json: transformers cannot load the tokenizer"):
        tokenizer_files.load(tmp_path)


def test_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no tokenizer files"):
        tokenizer_files.load(tmp_path)


def test_a_named_template_that_is_no_text_is_refused_by_its_file(tmp_path: Path) -> None:
    """`{"a": 1}` in place of a template was a TypeError."""
    path = base(tmp_path, template="{{ messages }}")
    (path / "chat_template.jinja").unlink()
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": {"a": 1}}))
    with pytest.raises(InputError, match=r"tokenizer_config\.json: chat_template: 'a' is 1, expected the text of a"):
        tokenizer_files.load(path)
