"""`requant.data` without canaries: file formats, completions, windows, overlap, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import chat
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from requant.data import documents as documents_module
from requant.data import healing_text, overlap, packing
from requant.data.documents import COMPLETION_KEYS, TextSource, TokenDocument, adds_bos, read_texts, tokenize
from requant.errors import InputError

TEMPLATE = chat.ECHO


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return chat.tokenizer()


def rows(path: Path, *values: Any, suffix: str = "jsonl") -> TextSource:
    file = path / f"rows.{suffix}"
    text = json.dumps(list(values)) if suffix == "json" else "\n".join(json.dumps(v) for v in values)
    file.write_text(text, encoding="utf-8")
    return TextSource(path=file)


def marked(tokenizer: Any, document: TokenDocument) -> str:
    """The text of the tokens that count."""
    text: str = tokenizer.decode([i for i, s in zip(document.ids, document.scored, strict=True) if s])
    return text


def whole(tokenizer: Any, document: TokenDocument) -> str:
    text: str = tokenizer.decode(document.ids)
    return text


def refused(source: TextSource, tokenizer: Any, asked: Any = "auto") -> str:
    with pytest.raises(InputError) as caught:
        tokenize(source, tokenizer, asked)
    return str(caught.value)


def test_text_rows_count_whole(tmp_path: Path, tokenizer: Any) -> None:
    documents = tokenize(rows(tmp_path, {"text": "ab é"}, {"text": ""}, {"text": "c"}), tokenizer)
    assert [whole(tokenizer, d) for d in documents] == ["ab é", "c"]
    assert [marked(tokenizer, d) for d in documents] == ["ab é", "c"]
    assert [d.n_bytes for d in documents] == [5, 1]


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_chats_count_what_the_assistant_says(tmp_path: Path, tokenizer: Any, key: str) -> None:
    turns: list[dict[str, str]] = [
        {"role": "system", "content": "be"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo!"},
        {"role": "user", "content": "more"}, {"role": "assistant", "content": "ok"},
    ]  # fmt: skip
    if key == "conversations":
        turns = [
            {"from": {"user": "human", "assistant": "gpt"}.get(t["role"], t["role"]), "value": t["content"]}
            for t in turns
        ]
    (document,) = tokenize(rows(tmp_path, {key: turns}), tokenizer)
    text = "<system>be</end><user>hi</end><assistant>yo!</end><user>more</end><assistant>ok</end>"
    assert whole(tokenizer, document) == text
    assert marked(tokenizer, document) == "yo!</end>ok</end>"
    assert document.n_bytes == len("yo!</end>ok</end>")


def test_completions_use_the_chat_template_when_there_is_one(tmp_path: Path, tokenizer: Any) -> None:
    for prompt, answer in COMPLETION_KEYS:
        (document,) = tokenize(rows(tmp_path, {prompt: "2+2", answer: "4"}), tokenizer)
        assert whole(tokenizer, document) == "<user>2+2</end><assistant>4</end>"
        assert marked(tokenizer, document) == "4</end>"
    (document,) = tokenize(rows(tmp_path, {"instruction": "add", "input": "2 2", "output": "4"}), tokenizer)
    assert whole(tokenizer, document) == "<user>add\n2 2</end><assistant>4</end>"


def test_completions_without_a_template(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    (document,) = tokenize(rows(tmp_path, {"prompt": "2+2=", "completion": "4."}), tokenizer)
    assert (whole(tokenizer, document), marked(tokenizer, document)) == ("2+2=4.", "4.")
    chat = rows(tmp_path, {"messages": [{"role": "user", "content": "x"}]})
    assert "row 1 is not a chat row: the tokenizer has no chat template" in refused(chat, tokenizer)


def test_an_empty_message_is_a_message(tmp_path: Path, tokenizer: Any) -> None:
    """Empty system prompts are common in chat data."""
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (document,) = tokenize(rows(tmp_path, {"messages": turns}), tokenizer)
    assert whole(tokenizer, document) == "<system></end><user>a</end><assistant>b</end>"


def test_a_template_that_rewrites_history_is_refused(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that drops earlier turns leaves no boundary to cut at."""
    monkeypatch.setattr(
        tokenizer, "chat_template", "{{ messages | map(attribute='content') | join | length }}" + TEMPLATE
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    source = rows(tmp_path, {"messages": turns * 2})
    assert "row 1 is not a chat row: the chat template rewrites what came before the last answer" in refused(
        source, tokenizer
    )
    (document,) = tokenize(source, tokenizer, completions=False)
    assert all(document.scored), "text that is only calibrated needs no places"


def test_a_column_may_be_named(tmp_path: Path, tokenizer: Any) -> None:
    source = rows(tmp_path, {"body": "xyz", "text": "no"})
    named = TextSource(path=source.path, column="body")
    assert whole(tokenizer, tokenize(named, tokenizer)[0]) == "xyz"
    assert read_texts(named) == ["xyz"]
    assert "no column 'bodi'; it has body, text" in refused(TextSource(path=source.path, column="bodi"), tokenizer)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("auto", "no text column (text or content); it has foo, bar: set data.column"),
        ("text", "no text column"),
        ("chat", "no chat column (messages or conversations); it has foo, bar: set data.column"),
        ("completion", "no prompt and completion columns; it has foo, bar"),
    ],
)
def test_unknown_columns_are_named(tmp_path: Path, tokenizer: Any, asked: str, message: str) -> None:
    assert message in refused(rows(tmp_path, {"foo": "1", "bar": "2"}), tokenizer, asked)


def test_file_kinds(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("one document\nof two lines")
    assert len(tokenize(TextSource(path=tmp_path / "a.txt"), tokenizer)) == 1
    (tmp_path / "a.csv").write_text('id,text\n1,"x, y"\n2,z\n')
    assert read_texts(TextSource(path=tmp_path / "a.csv")) == ["x, y", "z"]
    assert read_texts(rows(tmp_path, {"text": "p"}, {"text": "q"}, suffix="json")) == ["p", "q"]
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["m", "n"]}), tmp_path / "a.parquet")
    assert read_texts(TextSource(path=tmp_path / "a.parquet", documents=1)) == ["m"]
    assert len(read_texts(TextSource(builtin="pydoc"))) > 50


def test_quoted_newlines_of_a_csv_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text\n"line one\nline two"\nnext\n')
    assert read_texts(TextSource(path=tmp_path / "a.csv")) == ["line one\nline two", "next"]


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x0c", "\u2029"])
def test_json_lines_end_at_newlines_only(tmp_path: Path, separator: str) -> None:
    """Web text holds Unicode line separators, which JSON allows unescaped inside strings."""
    text = f"a{separator}b"
    line = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(line + "\n" + line + "\n", encoding="utf-8")
    assert read_texts(TextSource(path=tmp_path / "a.jsonl")) == [text, text]


def test_broken_files_name_the_line(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    assert "a.jsonl:3: not valid JSON" in refused(TextSource(path=tmp_path / "a.jsonl"), tokenizer)
    (tmp_path / "b.jsonl").write_text('"just a string"\n')
    assert "expected objects with columns, found str" in refused(TextSource(path=tmp_path / "b.jsonl"), tokenizer)
    (tmp_path / "c.jsonl").write_text("")
    assert "holds no rows" in refused(TextSource(path=tmp_path / "c.jsonl"), tokenizer)
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\x00\xd8")
    assert "cannot be read" in refused(TextSource(path=tmp_path / "d.txt"), tokenizer)
    assert "no such file" in refused(TextSource(path=tmp_path / "absent.txt"), tokenizer)
    assert "every row is empty" in refused(rows(tmp_path, {"text": ""}), tokenizer)


def test_a_report_never_shows_a_local_path(tmp_path: Path) -> None:
    assert str(TextSource(path=tmp_path / "secret" / "a.txt")) == "a.txt"
    assert str(TextSource(dataset="org/name", config="en", split="test")) == "org/name:en:test"


def documents(*lengths: int, start: int = 10) -> list[TokenDocument]:
    return [TokenDocument(tuple(range(start, start + n)), (True,) * n, n) for n in lengths]


@pytest.mark.parametrize("bos", [None, 1])
def test_windows_are_packed_from_shuffled_documents(bos: int | None) -> None:
    docs = documents(5, 7, 9)
    windows = packing.calibration_windows([("a", docs, 1.0)], samples=2, length=8, seed=0, bos=bos, eos=2)
    assert (windows.shape, windows.dtype) == ((2, 8), torch.int64)
    tokens = [t for t in windows.flatten().tolist() if t != bos]
    stream = [t for d in docs for t in (*d.ids, 2)]
    assert all(tokens.count(t) <= stream.count(t) for t in set(tokens)), "nothing is repeated or made up"


@pytest.mark.parametrize("length", [512, 2048])
def test_every_window_begins_with_bos(length: int) -> None:
    """As every window that is scored: 6 to 11 of 64 did, where a document happened to begin."""
    docs = [TokenDocument((10,) * n, (True,) * n, 1) for n in [400, 900, 1500, 3000, 250] * 40]
    windows = packing.calibration_windows([("a", docs, 1.0)], samples=24, length=length, seed=0, bos=1, eos=2)
    text = healing_text.pack([("a", docs, 1.0)], train=24, held_out=4, length=length, seed=0, bos=1, eos=2)
    for made in (windows, text.windows):
        assert made.shape[1] == length
        assert bool((made[:, 0] == 1).all())
        assert not bool((made[:, 1] == 1).any()), "and not twice"


def test_cutting_loses_no_token() -> None:
    stream = [1, 10, 11, 12, 1, 13, 14, 15, 16, 17, 18]
    assert list(packing.cut(stream, 4, None)) == [[1, 10, 11, 12], [1, 13, 14, 15]]
    assert list(packing.cut(stream, 4, 1)) == [[1, 10, 11, 12], [1, 13, 14, 15], [1, 16, 17, 18]]
    assert list(packing.cut([], 4, 1)) == []


def test_shares_are_kept() -> None:
    entries = [("a", documents(400, start=0), 0.75), ("b", documents(400, start=5000), 0.25)]
    windows = packing.calibration_windows(entries, samples=8, length=16, seed=0, bos=None, eos=None)
    assert int((windows >= 5000).all(dim=1).sum()) == 2
    assert int((windows < 5000).all(dim=1).sum()) == 6
    odd = packing.calibration_windows(
        [(n, d, 1.0) for n, d, _ in entries], samples=7, length=16, seed=0, bos=None, eos=None
    )
    assert odd.shape == (7, 16)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(InputError, match="calibration: a has 20 tokens, 2 windows of 8, but its share is 3"):
        packing.calibration_windows([("a", documents(20), 1.0)], samples=3, length=8, seed=0, bos=None, eos=None)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (2100, "(this text allows 2 samples of 2048 tokens or 8 samples of 512 tokens or 16 samples of 256 tokens)"),
        (700, "(this text allows 2 samples of 512 tokens or 4 samples of 256 tokens)"),
        (20, "or give more text"),
    ],
)
def test_too_little_text_says_what_it_allows(tokens: int, says: str) -> None:
    """Half of the windows are its share."""
    entries = [("a", documents(tokens), 1.0), ("b", documents(500_000), 1.0)]
    with pytest.raises(InputError) as refused:
        packing.calibration_windows(entries, samples=128, length=2048, seed=0, bos=None, eos=None)
    assert str(refused.value).endswith(says)


def test_the_seed_decides_and_the_digest_shows_it() -> None:
    """The digest is part of a run's key: it must not move between versions or machines."""

    def make(seed: int) -> torch.Tensor:
        return packing.calibration_windows(
            [("a", documents(50, 60, 70), 1.0)], samples=4, length=16, seed=seed, bos=1, eos=2
        )

    assert torch.equal(make(3), make(3))
    assert packing.digest(make(3)) == packing.digest(make(3))
    assert packing.digest(make(3)) != packing.digest(make(4))
    fixed = torch.arange(6).reshape(2, 3)
    assert packing.digest(fixed) != packing.digest(fixed.reshape(3, 2))
    assert packing.digest(fixed) == "9e84b51c449b81c3ef3017a0137b130578a496eab1a16787a6dc6a1ec36dfcc5"
    assert packing.digest(fixed.T.contiguous().T) == packing.digest(fixed)


def test_overlap_of_identical_and_of_foreign_text() -> None:
    window = torch.arange(100)[None]
    assert overlap.overlap(window, [list(range(40))]) == 1.0
    assert overlap.overlap(window, [list(range(500, 540))]) == 0.0
    assert overlap.overlap(window, [list(range(20)), list(range(500, 520))]) == 0.5
    assert overlap.overlap(window, [[1, 2, 3]]) == 0.0, "too short to say"


def test_a_prompt_that_all_documents_share_is_no_overlap() -> None:
    prompt = list(range(1000, 1040))
    calibration = torch.tensor([prompt + list(range(40 * i, 40 * i + 40)) for i in range(4)])
    foreign = [prompt + list(range(5000 + 40 * i, 5040 + 40 * i)) for i in range(6)]
    assert 0.0 < overlap.overlap(calibration, foreign[:3]) < 0.6, "of three documents nothing is common"
    assert overlap.overlap(calibration, foreign) == 0.0
    assert overlap.overlap(calibration, [row.tolist() for row in calibration]) == 1.0
    assert overlap.overlap(calibration, [prompt] * 6) == 1.0, "documents that are all alike"
    halves = [part for row in foreign for part in (row[:40], row[40:])]
    assert overlap.overlap(calibration, halves, [i // 2 for i in range(12)]) == 0.0, "documents of two windows"


def test_bos_is_not_doubled(tmp_path: Path, tokenizer: Any) -> None:
    assert not adds_bos(tokenizer)
    from tokenizers.processors import TemplateProcessing

    adding = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), bos_token="<s>"
    )
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    adding.chat_template = "<s>" + TEMPLATE
    assert adds_bos(adding)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (document,) = tokenize(rows(tmp_path, {"messages": turns}), adding)
    assert document.ids[0] != 0
    assert len(document.ids) == len(document.scored)
    assert marked(adding, document) == "b</end>"


def test_half_a_character_is_refused_with_its_row(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": "hello \\ud83d"}\n')
    assert "t.jsonl:2: a text in it holds half a surrogate pair" in refused(
        TextSource(path=tmp_path / "t.jsonl"), tokenizer
    )


def test_a_text_of_other_protocols_names_its_row(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"row 2 is not a text row: it has no column 'text'; it has body"):
        read_texts(rows(tmp_path, {"text": "a"}, {"body": "b"}))


def test_a_token_across_the_boundary_counts(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt and answer may share a token; part of it is answer, all of it is scored, and that is told."""
    monkeypatch.setattr(tokenizer, "chat_template", None)
    notes: list[str] = []
    (document,) = tokenize(rows(tmp_path, {"prompt": "q<us", "completion": "er>a"}), tokenizer, notes=notes)
    assert marked(tokenizer, document) == "<user>a"
    assert document.n_bytes == len("<user>a"), "bits per byte are of the text that is scored"
    assert f"rows.jsonl: {documents_module.ACROSS} (1 of 1 rows, the first is row 1)" in notes


def test_tools_need_a_template(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    row = {"prompt": "q", "completion": "a", "tools": [{"name": "f"}]}
    assert "row 1 is not a completion row: holds tools" in refused(rows(tmp_path, row), tokenizer)


@pytest.mark.parametrize(
    ("weights", "count", "expected"),
    [
        ([1.0] * 10, 8, [1] * 8 + [0] * 2),
        ([1.0] * 100, 128, [2] * 28 + [1] * 72),
        ([0.29, 0.71], 100, [29, 71]),
        ([0.5, 0.29, 0.21], 100, [50, 29, 21]),
        ([0.1, 0.1, 0.1, 0.7], 16, [2, 2, 1, 11]),
        ([1.0, 0.01], 64, [63, 1]),
        ([1.0], 7, [7]),
    ],
)
def test_windows_are_shared_by_largest_remainder(weights: list[float], count: int, expected: list[int]) -> None:
    """The remainder all to the first entry gave it eight windows of eight."""
    assert packing.shares(weights, count) == expected


def test_a_source_that_gets_no_window_is_told() -> None:
    entries = [(f"{i}.jsonl", documents(200, start=1000 * i), 1.0) for i in range(10)]
    notes: list[str] = []
    packing.calibration_windows(entries, samples=8, length=16, seed=0, bos=None, eos=None, notes=notes)
    assert [note.partition(" (")[0] for note in notes] == [
        f"calibration: {name} gets none of the 8 windows" for name in ("8.jsonl", "9.jsonl")
    ]
    assert "raise calibration.samples or its share" in notes[0]
    text = healing_text.pack(entries, train=8, held_out=4, length=16, seed=0, bos=None, eos=None, notes=notes)
    assert sum("healing: " in note and "gets none of the 8 windows" in note for note in notes) == 2
    assert text.train == 8


@pytest.mark.parametrize("end", ["</s>", "</s>\\n", "</s> \\n"])
def test_a_text_that_ends_in_eos_gets_no_second_one(tmp_path: Path, end: str) -> None:
    """A chat template's own EOS, also with a line end after it, and one that plain texts hold."""
    template = "<s>{% for m in messages %}({{ m.content }}){% endfor %}" + end.replace("\\n", "{{ '\\n' }}")
    made = chat.tokenizer(template)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    source = rows(tmp_path, {"messages": turns})
    (document,) = tokenize(source, made, completions=False)
    assert document.ended
    text = made.decode(document.marked(bos=None, eos=1))
    assert text == "<s>(a)(b)" + end.replace("\\n", "\n")
    for windows in (
        packing.calibration_windows([("a", [document] * 9, 1.0)], samples=2, length=20, seed=0, bos=None, eos=1),
        healing_text.pack([("a", [document] * 9, 1.0)], train=2, held_out=2, length=4, seed=0, bos=None, eos=1).windows,
    ):
        assert "</s></s>" not in made.decode(windows.flatten().tolist()).replace("\n", "").replace(" ", "")


def test_a_text_without_eos_at_its_end_gets_one(tmp_path: Path, tokenizer: Any) -> None:
    several = tokenize(rows(tmp_path, {"text": "a"}, {"text": "</s>a bc"}, {"text": "b</s>"}), tokenizer)
    assert [tokenizer.decode(d.marked(0, 1)) for d in several] == ["<s>a</s>", "<s></s>a bc</s>", "<s>b</s>"]


def test_bos_that_stands_twice_is_one(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that was rendered before, and a tokenizer or template that writes BOS once more."""
    monkeypatch.setattr(tokenizer, "needs_bos", True, raising=False)
    (document,) = tokenize(rows(tmp_path, {"text": "<s><s>ab"}), tokenizer)
    assert whole(tokenizer, document) == "ab"
    assert document.n_bytes == 2, "bits per byte are of the text"
    monkeypatch.setattr(tokenizer, "chat_template", "<s>" + TEMPLATE)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (document,) = tokenize(rows(tmp_path, {"messages": turns}), tokenizer, completions=False)
    assert document.n_bytes == len("<user>a</end><assistant>b</end>")


@pytest.mark.parametrize(
    ("row", "text", "answer", "note"),
    [
        ({"question": "Capital of France?", "answer": "Paris"}, "Capital of France?\nParis", "Paris", documents_module.BY_LINE),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n1 2\n3", "3", documents_module.BY_LINE),
        ({"question": "Q: x\nA:", "answer": " y"}, "Q: x\nA: y", " y", documents_module.JOINED),
        ({"prompt": "2+2=", "completion": "4"}, "2+2=4", "4", documents_module.AS_THEY_ARE),
        ({"prompt": "Q: x\nA:", "completion": " y"}, "Q: x\nA: y", " y", None),
        ({"prompt": "x", "response": "y"}, "x\ny", "y", documents_module.BY_LINE),
        ({"prompt": "", "completion": "y"}, "y", "y", None),
    ],
)  # fmt: skip
def test_question_and_answer_without_a_template_are_two_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, row: Any, text: str, answer: str, note: str | None
) -> None:
    """Prompt and completion are joined as they are, as trainers do; others had nothing between them: "France?Paris"."""
    monkeypatch.setattr(tokenizer, "chat_template", None)
    notes: list[str] = []
    (document,) = tokenize(rows(tmp_path, row), tokenizer, notes=notes)
    assert (whole(tokenizer, document), marked(tokenizer, document)) == (text, answer)
    assert document.n_bytes == len(answer)
    assert [n for n in notes if "no chat template" in n] == (
        [f"rows.jsonl: {note} (1 of 1 rows, the first is row 1)"] if note else []
    )
