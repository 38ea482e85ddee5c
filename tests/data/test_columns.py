"""`requant.data.columns`: which columns are read, and which text would be left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from requant.data.columns import columns_of
from requant.data.row_files import TextSource
from requant.errors import InputError

USER, ANSWER = {"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a thing"}
LONG = "a sentence of many words that is longer than any label would ever be, and says something"


def turns(row: dict[str, Any], asked: Any = "auto", **options: Any) -> list[tuple[str, str]]:
    """(role, content) of the row's messages."""
    found = columns_of(TextSource(path=Path("rows.jsonl"), **options), [row], asked).conversation_in(row)
    assert found is not None
    return [(m["role"], m["content"]) for m in found.messages]


def refused(row: dict[str, Any], asked: Any = "auto", **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        columns_of(TextSource(path=Path("rows.jsonl"), **options), [row], asked)
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "i", "input": "x", "output": "o"}, [("user", "i\nx"), ("assistant", "o")]),
        ({"instruction": "i", "context": LONG, "response": "o"}, [("user", f"i\n{LONG}"), ("assistant", "o")]),
        ({"question": "i", "context": LONG, "answer": "o"}, [("user", f"i\n{LONG}"), ("assistant", "o")]),
        ({"input": "i", "output": "o"}, [("user", "i"), ("assistant", "o")]),
        ({"problem": "i", "solution": "o"}, [("user", "i"), ("assistant", "o")]),
        ({"prompt": [USER], "completion": [ANSWER]}, [("user", "what is it"), ("assistant", "a thing")]),
        (
            {"instruction": "i", "input": "", "output": "o", "system": LONG, "history": [["p", "q"]]},
            [("system", LONG), ("user", "p"), ("assistant", "q"), ("user", "i"), ("assistant", "o")],
        ),
        (
            {"system": LONG, "messages": [USER, ANSWER]},
            [("system", LONG), ("user", "what is it"), ("assistant", "a thing")],
        ),
        ({"text": [USER, ANSWER]}, [("user", "what is it"), ("assistant", "a thing")]),
    ],
)
def test_columns_that_belong_to_a_conversation(row: dict[str, Any], expected: Any) -> None:
    assert turns(row) == expected


def test_columns_that_only_later_rows_have_are_read() -> None:
    first, later = {"question": "q", "answer": "a"}, {"question": "q", "answer": "a", "system": "be", "context": "c"}
    columns = columns_of(TextSource(path=Path("rows.jsonl")), [first] * 30 + [later], "auto")
    found = columns.conversation_in(later)
    assert found is not None
    assert [m["content"] for m in found.messages] == ["be", "q\nc", "a"]
    with pytest.raises(InputError, match="column 'rationale' holds text"):
        columns_of(TextSource(path=Path("rows.jsonl")), [first] * 30 + [first | {"rationale": LONG}], "auto")


def test_a_history_may_be_json_text_and_a_csv_may_have_an_index() -> None:
    row = {"": "0", "instruction": "i", "output": "o", "history": '[["p", "q"]]'}
    assert [c for _, c in turns(row)] == ["p", "q", "i", "o"]


def test_tools_go_with_messages() -> None:
    row = {"messages": [USER, ANSWER], "tools": '[{"name": "f", "description": "does a long and useful thing"}]'}
    found = columns_of(TextSource(path=Path("rows.jsonl")), [row], "auto").conversation_in(row)
    assert found is not None
    assert found.tools == (
        {"type": "function", "function": {"name": "f", "description": "does a long and useful thing"}},
    )


def refused_rows(rows: list[dict[str, Any]], asked: Any = "auto", **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        columns_of(TextSource(path=Path("rows.jsonl"), **options), rows, asked)
    return str(caught.value)


def test_a_format_that_is_not_that_of_the_rows_is_told_with_the_one_that_reads_them() -> None:
    pairs = refused_rows([{"prompt": "p", "completion": "c"}], "chat")
    assert "these are rows of prompt and completion (it has prompt, completion), which format: auto reads" in pairs
    chats = refused_rows([{"messages": [USER, ANSWER]}], "completion")
    assert "these are rows of messages (it has messages), which format: auto reads" in chats


@pytest.mark.parametrize("options", [{}, {"ignore": ("prompt", "completion")}])
@pytest.mark.parametrize("asked", ["auto", "chat"])
def test_rows_of_two_forms_are_told_with_their_numbers(asked: str, options: dict[str, Any]) -> None:
    rows: list[dict[str, Any]] = [{"messages": [USER, ANSWER]}] * 4 + [{"prompt": LONG, "completion": "c"}] * 3
    message = refused_rows(rows, asked, **options)
    assert "rows of two forms: messages in 4 rows; prompt and completion from row 5 on, 3 rows" in message
    assert "two entries of calibration.mix" in message


def test_nulls_in_the_column_that_is_used_are_no_other_form() -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [USER, ANSWER], "prompt": None, "completion": None},
        {"messages": None, "prompt": LONG, "completion": "c"},
    ]
    source = TextSource(path=Path("rows.jsonl"), ignore=("prompt", "completion"))
    assert columns_of(source, rows, "auto").chat == "messages"
    assert columns_of(TextSource(path=Path("rows.jsonl")), rows, "chat").chat == "messages"
    assert "prompt and completion from row 2 on, 1 rows" in refused_rows(rows)
    assert columns_of(TextSource(path=Path("rows.jsonl")), [{"text": "a b"}, {"text": None}], "auto").text == "text"


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [USER, ANSWER], "text": LONG}, "text"),
        ({"question": "q", "answer": "a", "explanation": LONG}, "explanation"),
        ({"prompt": "p", "completion": "c", "documents": [{"title": "t", "body": LONG}]}, "documents"),
        ({"prompt": "say A", "text": LONG}, "prompt"),
        ({"question": "q", "answer": "1", "choices": ["yes", "no"]}, "choices"),
        ({"text": LONG, "summary": "first line\nsecond line"}, "summary"),
        ({"messages": [USER, ANSWER], "images": ["cat.png"]}, "images"),
        ({"question": "q", "answer": "a", "hint": "think of what it would be if"}, "hint"),
        ({"question": "q", "answer": "a", "hint": "\u8003\u3048\u3066\u307f\u3066" * 4}, "hint"),
    ],
)
def test_text_that_would_be_left_out_is_refused_by_name(row: dict[str, Any], name: str) -> None:
    assert f"rows.jsonl: column {name!r} holds text that would be left out" in refused(row)
    source = TextSource(path=Path("rows.jsonl"), ignore=(name,))
    assert name not in columns_of(source, [row], "auto").used


@pytest.mark.parametrize(
    "more",
    [
        {"url": "https://example.org/" + "x" * 80, "sha": "0" * 64, "when": "2026-11-28T10:00:00Z"},
        {
            "id": "0123",
            "category": "closed_qa",
            "score": 0.5,
            "lang": None,
            "tags": ["a", "b"],
            "source": {"url": "x.org"},
        },
        {"prompt": "what  is it"},  # repeats the first message
        {"text": "<|user|>what is it<|assistant|>a thing<|end|> and so on, as some template has rendered it once"},
    ],
)
def test_labels_and_repetitions_may_be_left_out(more: dict[str, Any]) -> None:
    assert turns({"messages": [USER, ANSWER], **more}) == [("user", "what is it"), ("assistant", "a thing")]


def test_labels_of_several_words_are_told() -> None:
    row = {"question": "q", "answer": "a", "topic": "linear algebra", "id": "q1", "tags": ["hard one"]}
    assert columns_of(TextSource(path=Path("rows.jsonl")), [row], "auto").left_out == ("topic", "tags")
    ignoring = TextSource(path=Path("rows.jsonl"), ignore=("topic", "tags"))
    assert columns_of(ignoring, [row], "auto").left_out == ()


def test_a_format_or_a_column_is_a_choice() -> None:
    row = {"messages": [USER, ANSWER], "text": LONG, "notes": LONG}
    assert "column 'notes'" in refused(row, "chat")
    assert columns_of(TextSource(path=Path("rows.jsonl"), column="text"), [row], "auto").text_in(row) == LONG
    assert turns(row, column="messages") == [("user", "what is it"), ("assistant", "a thing")]


def test_preference_pairs_are_explained() -> None:
    assert "preference pairs (prompt, chosen, rejected)" in refused({"prompt": "p", "chosen": "c", "rejected": "r"})


def test_ignore_names_a_column() -> None:
    assert "ignore names 'nots', which is no column; it has text, notes" in refused(
        {"text": "a", "notes": LONG}, ignore=("nots",)
    )


@pytest.mark.parametrize("name", ["title", "page_title", "Topic", "headline"])
def test_a_title_of_many_words_is_a_label(name: str) -> None:
    """The titles of encyclopedias and news have six words and more; such a column stopped a run."""
    title = "A Short History of Nearly All the Things"
    row = {"text": LONG, name: title}
    assert columns_of(TextSource(path=Path("x.jsonl")), [row], "auto").left_out == (name,)
    assert f"column {name!r} holds text" in refused({"text": LONG, name: title * 5})
    assert f"column {name!r} holds text" in refused({"text": LONG, name: "a title\nand its text"})
    assert "column 'remark' holds text" in refused({"text": LONG, "remark": title})
