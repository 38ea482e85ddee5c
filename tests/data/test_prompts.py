"""Prompts of held-out rows: up to the last answer, spread, the same each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import chat
from helpers.e2e import write_rows

from requant.data import prompts
from requant.data.documents import TextSource
from requant.runtime import guarded_process
from requant_eval.metrics.answer_checks import reads_calls

TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
TAGGED = (  # calls as Qwen writes them
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}</end>'
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
BARE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</end>{% endfor %}"
CHANNELS = (  # the answer's channel is the model's to write: as gpt-oss's
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}[final]{% endif %}{{ m.content }}</end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NONE_NEEDED = "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}<assistant>{% endif %}{% endfor %}"


def held_out(tmp: Path, rows: list[Any], template: str | None = chat.ECHO, **more: Any) -> tuple[list[Any], str]:
    write_rows(tmp / "rows.jsonl", rows)
    settings: dict[str, Any] = {"count": 20, "longest": 200, "reads_calls": reads_calls} | more
    return prompts.held_out(TextSource(path=tmp / "rows.jsonl"), chat.tokenizer(template), "auto", **settings)


def turns(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]}


def test_a_chat_is_asked_up_to_its_last_answer(tmp_path: Path) -> None:
    (found,), why = held_out(tmp_path, [turns("a?", "b", "c?", "d")])
    assert (found.text, found.shown, found.own, found.row) == (
        "<user>a?</end><assistant>b</end><user>c?</end><assistant>", "c?", "d", 1,
    )  # fmt: skip
    assert why == ""
    assert chat.tokenizer().decode(found.ids) == found.text


def test_what_follows_the_last_answer_is_not_asked(tmp_path: Path) -> None:
    (found,), _ = held_out(tmp_path, [turns("a?", "b", "thanks")])
    assert found.text == "<user>a?</end><assistant>"


@pytest.mark.parametrize("row", [{"prompt": "Two and two? ", "completion": "four"}])
def test_a_completion_is_asked_by_its_prompt(tmp_path: Path, row: dict[str, str]) -> None:
    assert held_out(tmp_path, [row], None)[0][0].text == "Two and two? "
    assert held_out(tmp_path, [row])[0][0].text == "<user>Two and two? </end><assistant>"
    (asked,), _ = held_out(tmp_path, [{"question": "Two and two?", "answer": "four"}], None)
    assert asked.text == "Two and two?\n", "the line end that the documents have"


def test_plain_text_has_no_prompt(tmp_path: Path) -> None:
    assert held_out(tmp_path, [{"text": "Once upon a time"}]) == ([], "the rows are plain text and have no prompt")


def test_plain_text_is_continued_where_its_beginning_is_asked(tmp_path: Path) -> None:
    """Of the rows that go on after it, one of each part; no text twice."""
    texts = ["Once upon a time there was", "Once", "Two times two is four, and", "Two times two is four, but not"]
    found, why = held_out(tmp_path, [{"text": text} for text in texts], count=2, begin=9)
    assert (why, [p.row for p in found]) == ("", [1, 3])
    for prompt in found:
        text, ids = texts[prompt.row - 1], chat.tokenizer()(texts[prompt.row - 1])["input_ids"]
        assert prompt.plain
        assert list(prompt.ids) == ids[:9], "tokens of the whole text, not of its cut letters"
        assert prompt.text == prompt.shown
        assert prompt.shown + prompt.own == text
    none = held_out(tmp_path, [{"text": text} for text in texts], begin=90)
    assert none == ([], "no row has more than 90 tokens")


def test_prompts_are_spread_and_the_same_each_time(tmp_path: Path) -> None:
    rows = [turns(f"question {n}?", "yes") for n in range(100)]
    found, _ = held_out(tmp_path, rows, count=4)
    assert [p.row for p in found] == [1, 26, 51, 76]
    assert held_out(tmp_path, rows, count=4)[0] == found
    assert [p.row for p in held_out(tmp_path, rows[:3], count=4)[0]] == [1, 2, 3]


def test_rows_that_cannot_be_asked_give_way_to_the_next(tmp_path: Path) -> None:
    rows = [turns("x" * 300, "y"), turns("same?", "y"), turns("same?", "y"), turns("other?", "y")]
    assert [(p.row, p.shown) for p in held_out(tmp_path, rows, count=2)[0]] == [(2, "same?"), (4, "other?")]


def test_why_there_are_none_is_said(tmp_path: Path) -> None:
    assert held_out(tmp_path, [turns("x" * 300, "y")]) == ([], "no prompt is shorter than 200 tokens")
    only = {"messages": [{"role": "assistant", "content": "y"}]}
    assert held_out(tmp_path, [only])[1] == "no row has a prompt before an answer"


def test_a_template_that_opens_no_turn_is_found(tmp_path: Path) -> None:
    found, why = held_out(tmp_path, [turns("a?", "b")], BARE)
    assert not found
    assert why == (
        "the chat template does not open the turn of an answer: it leaves out '<assistant>' where one is asked for"
    )
    refusing = "{% if add_generation_prompt %}{{ raise_exception('never') }}{% endif %}" + BARE
    assert "never" in held_out(tmp_path, [turns("a?", "b")], refusing)[1]


@pytest.mark.parametrize(
    "template", [chat.ECHO, chat.THINKING, chat.OPENED, chat.STRICT, chat.PARTS, CHANNELS, chat.ENDED, NONE_NEEDED]
)
def test_templates_that_open_a_turn_do(template: str) -> None:
    empty_thought = template.replace("(){%", "<think>\n\n</think>{%")
    assert prompts.unopened(chat.tokenizer(empty_thought)) == ""


@pytest.mark.parametrize(("template", "read"), [(TAGGED, True), (chat.TOOLS, False)])
def test_tools_are_kept_where_calls_can_be_read(tmp_path: Path, template: str, read: bool) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
    messages = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (found,), _ = held_out(tmp_path, [{"messages": messages, "tools": [TOOL]}], template)
    assert found.calls
    assert [t["function"] for t in found.tools] == ([TOOL] if read else [])


def test_the_digest_is_of_what_is_asked(tmp_path: Path) -> None:
    items, _ = held_out(tmp_path, [turns("a?", "b")])
    made = prompts.Prompts(set_name="s", items=tuple(items), new_tokens=8, stops=(1,), decode=str)
    others = [
        prompts.Prompts(set_name="s", items=tuple(items), new_tokens=9, stops=(1,), decode=str),
        prompts.Prompts(set_name="s", items=tuple(items), new_tokens=8, stops=(1, 5), decode=str),
        prompts.Prompts(set_name="s", items=(), new_tokens=8, stops=(1,), decode=str),
    ]
    assert len({made.digest, *(other.digest for other in others)}) == 4
    assert made.fits([["x", True]])
    assert made.fits([]), "a variant that runs block by block is not asked"
    assert not made.fits([["x", True], ["y", True]])
    assert not made.fits(["x"]), "of a version that kept texts alone"


def test_an_answer_has_ended_by_its_last_token_and_not_by_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model may spell a stop token with others, and a stop token may have no text."""
    texts = {1: "", 2: "</s>", 3: "four"}
    items = tuple(prompts.Prompt(row=n, shown="?", text="?", ids=(3,), own="") for n in range(3))
    made = prompts.Prompts(
        set_name="s", items=items, new_tokens=2, stops=(1,), decode=lambda ids: "".join(texts[i] for i in ids)
    )
    monkeypatch.setattr("requant_eval.scoring.answers.answer", lambda *_, **__: [[3, 1], [3, 2], [1]])
    said = made.ask(None, torch.device("cpu"), lambda done, of: None)
    assert said == [("four", True), ("four</s>", False), ("", True)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_steps_are_captured_on_a_gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    item = prompts.Prompt(row=1, shown="?", text="?", ids=(3,), own="")
    made = prompts.Prompts(set_name="s", items=(item,), new_tokens=2, decode=str)
    monkeypatch.setattr(
        "requant_eval.scoring.answers.answer", lambda *_, capture, **__: [given.append(capture), [[3]]][1]
    )
    made.ask(None, torch.device(device), lambda done, of: None)
    assert (given[0] is None) == (device == "cpu")


def test_a_beginning_is_refused_where_rows_have_prompts_of_their_own(tmp_path: Path) -> None:
    assert held_out(tmp_path, [turns("a?", "b")], begin=9) == (
        [], "its rows are no plain text, and evaluate.answers.begin is for plain text alone (leave it out)",
    )  # fmt: skip


@pytest.mark.slow
def test_a_row_that_a_template_has_no_end_on_gives_way_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded_process, "SECONDS", 0.2)
    endless = "{% set n = namespace(s=0) %}{% for x in range(10**6) %}{% for y in range(10**6) %}{% set n.s = x %}"
    bomb = "{% if messages[0].content == 'bomb' %}" + endless + "{% endfor %}{% endfor %}{% endif %}"
    rows = [turns("bomb", "b"), turns("c?", "d"), turns("bomb", "f"), turns("g?", "h")]
    assert [p.shown for p in held_out(tmp_path, rows, bomb + chat.ECHO)[0]] == ["c?", "g?"]
