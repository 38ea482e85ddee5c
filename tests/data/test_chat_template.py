"""`data.chat_template`: what templates refuse, rewrite and leave out; where answers are."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest
from helpers import chat

from requant.data import chat_template, template_call
from requant.data.conversation import Conversation, RowError, conversation
from requant.errors import InputError

SYSTEM, USER, ANSWER = ({"role": r, "content": c} for r, c in (("system", "be"), ("user", "q"), ("assistant", "a")))
SECOND = [{"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]


def given(*messages: Any, **options: Any) -> Conversation:
    found = conversation(list(messages))
    assert found is not None
    return found.with_tools(options.get("tools"))


def rendered(template: str | None, conversation: Conversation) -> tuple[str, list[str], list[str]]:
    """(text, notes, the parts that are learned)."""
    tokenizer = chat.tokenizer(template)
    text, shown, notes = chat_template.render(tokenizer, conversation)
    return text, notes, [text[a:b] for a, b in chat_template.learned_spans(tokenizer, text, shown)]


def test_every_answer_is_located() -> None:
    text, notes, learned = rendered(chat.ECHO, given(SYSTEM, USER, ANSWER, *SECOND))
    assert text == "<system>be</end><user>q</end><assistant>a</end><user>r</end><assistant>b</end>"
    assert (notes, learned) == ([], ["a</end>", "b</end>"])


def test_an_answer_that_is_not_learned_is_none() -> None:
    assert rendered(chat.ECHO, given(USER, ANSWER | {"weight": 0}, *SECOND))[2] == ["b</end>"]
    assert rendered(chat.ECHO, given(SYSTEM, USER))[2] == []


def test_the_last_answer_is_located_where_the_template_rewrites_earlier_ones() -> None:
    text, _, learned = rendered(chat.THINKING, given(USER, ANSWER, *SECOND))
    assert text == "<user>q</end><assistant>a</end><user>r</end><assistant>()b</end>"
    assert learned == ["()b</end>"]


def test_a_generation_prompt_may_open_what_the_answer_leaves_out() -> None:
    text, _, learned = rendered(chat.OPENED, given(USER, ANSWER | {"content": "<think>hm</think>a"}))
    assert (text, learned) == ("<user>q</end><assistant>a</end>", ["a</end>"])


def test_an_answer_may_come_first() -> None:
    assert rendered(chat.ECHO, given(ANSWER, *SECOND))[2] == ["a</end>", "b</end>"]


def test_an_answer_that_cannot_be_located_is_refused() -> None:
    with pytest.raises(RowError, match="rewrites what came before the last answer"):
        rendered("{{ messages | map(attribute='content') | join | length }}" + chat.ECHO, given(USER, ANSWER))


def test_a_system_text_is_joined_to_the_user_turn_where_the_template_takes_none() -> None:
    text, notes, learned = rendered(chat.STRICT, given(SYSTEM, USER, ANSWER))
    assert text == "<user>be\n\nq</end><assistant>a</end>"
    assert (notes, learned) == ([chat_template.SYSTEM_JOINED], ["a</end>"])


@pytest.mark.parametrize(
    ("messages", "advice"),
    [
        ((USER, USER, ANSWER), "turns 1 and 2 are both 'user': join them into one"),
        ((ANSWER, USER, ANSWER), "the first turn is the assistant's: begin with the user's"),
        ((SYSTEM, USER, USER, ANSWER), "turns 2 and 3 are both 'user'"),
    ],
)
def test_a_refusal_says_what_to_do(messages: Any, advice: str) -> None:
    with pytest.raises(RowError, match=f"refuses it: TemplateError: (roles must|no system).*; {advice}"):
        rendered(chat.STRICT, given(*messages))


def test_a_template_may_raise_anything() -> None:
    for broken in ("{{ messages[7].content }}", "{% for %}", "{{ 1 / 0 }}", "{{ messages.x.y.z }}"):
        with pytest.raises(RowError, match="the chat template refuses it: "):
            rendered(broken, given(USER, ANSWER))
    with pytest.raises(RowError, match="no chat template"):
        rendered(None, given(USER, ANSWER))


def test_a_template_adds_no_book_to_every_row() -> None:
    """A template of 200 kB of text made 8 MB of 40 short rows, and 20 seconds of tokenizing."""
    book = "- " * 50_000
    with pytest.raises(RowError, match=r"refuses it: it writes 100,0\d\d characters for a conversation of \d\d"):
        rendered(book + chat.ECHO, given(USER, ANSWER))
    prompt = "You are one of many. " * 2000
    long = given({"role": "user", "content": book}, ANSWER)
    assert rendered(prompt + chat.ECHO, given(USER, ANSWER))[0].startswith(prompt)
    assert rendered(chat.ECHO, long)[0].startswith("<user>- - "), "what a row holds itself may be long"


def test_tools_and_calls_are_rendered() -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"city": "text"}}}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
    turns = (
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        ANSWER,
    )
    text, notes, learned = rendered(chat.TOOLS, given(*turns, tools=(tool,)))
    assert json.dumps(tool) in text
    assert notes == []
    assert learned == ['!weather{"city": "Ulm"}</end>', "a</end>"]
    _, notes, _ = rendered(chat.ECHO, given(*turns, tools=(tool,)))
    assert notes == ["the chat template leaves out tool calls", "the chat template leaves out the list of tools"]


def test_arguments_are_objects_unless_the_template_needs_text() -> None:
    """JSON text of OpenAI's files would be written as a quoted string by templates that write arguments as JSON."""
    for arguments in ('{"x": 1}', {"x": 1}):
        turn = {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
        }
        text, notes, learned = rendered(chat.TOOLS, given(USER, turn))
        assert (text.endswith('!f{"x": 1}</end>'), notes, learned) == (True, [], ['!f{"x": 1}</end>'])
        text, notes, _ = rendered(chat.OBJECT_ARGUMENTS, given(USER, turn))
        assert (text.endswith("!fx=1</end>"), notes) == (True, [])
        text, notes, _ = rendered(chat.TEXT_ARGUMENTS, given(USER, turn))
        assert (text.endswith('!f{"x": 1}</end>'), notes) == (True, [chat_template.ARGUMENTS])


def test_calls_are_numbered_where_the_template_asks_for_short_ids() -> None:
    call = {"id": "call_aB3dE5fG7hI9", "type": "function", "function": {"name": "f", "arguments": {}}}
    turns = (
        USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "4"},
    )
    text, notes, _ = rendered(chat.SHORT_IDS, given(*turns, ANSWER))
    assert "#call00000" in text
    assert text.count("call00000") == 2
    assert notes == [chat_template.IDS]


def test_what_is_left_out_is_found_whatever_else_the_text_says() -> None:
    """Names of tools and short contents also stand in other text."""
    tool = {"type": "function", "function": {"name": "search"}}
    turns = ({"role": "user", "content": "search for a"}, {"role": "assistant", "tool_calls": [tool]}, ANSWER)
    _, notes, _ = rendered(chat.ECHO, given(*turns, tools=(tool,)))
    assert notes == ["the chat template leaves out tool calls", "the chat template leaves out the list of tools"]
    _, notes, _ = rendered(chat.KNOWN, given(USER, {"role": "critic", "content": "q"}, ANSWER))
    assert notes == ["the chat template leaves out messages of role 'critic'"]


def test_thinking_that_is_left_out_is_told() -> None:
    thought = ANSWER | {"content": "<think>hm</think>a"}
    assert rendered(chat.OPENED, given(USER, thought))[1] == [
        "the chat template leaves out the thinking of the last answer"
    ]
    notes = rendered(chat.ECHO, given(USER, ANSWER | {"reasoning_content": "hm"}))[1]
    assert notes == ["the chat template leaves out reasoning_content of the last answer"]
    assert rendered(chat.ECHO, given(USER, thought))[1] == []


def test_an_answer_is_located_by_a_mark_where_rendering_a_part_does_not_show_it() -> None:
    """Some templates end with EOS unless an answer is asked for."""
    tokenizer = chat.tokenizer(chat.ENDED)
    tokenizer.add_tokens(["</end>"], special_tokens=True)
    text, shown, _ = chat_template.render(tokenizer, given(USER, ANSWER))
    assert text == "<user>q</end><assistant>a</end></s>"
    assert [text[a:b] for a, b in chat_template.learned_spans(tokenizer, text, shown)] == ["a</end>"]


def test_a_role_that_vanishes_is_told() -> None:
    turns = (USER, {"role": "tool", "content": "sunny"}, ANSWER)
    assert rendered(chat.KNOWN, given(*turns))[1] == ["the chat template leaves out messages of role 'tool'"]
    text, notes, _ = rendered(chat.KNOWN, given({"role": "developer", "content": "be"}, USER, ANSWER))
    assert text.startswith("<system>be</end>")
    assert notes == [chat_template.AS_SYSTEM]


def test_the_date_of_a_template_is_frozen() -> None:
    tokenizer = chat_template.freeze_date(chat.tokenizer(chat.DATED), datetime.date(2025, 3, 1))
    assert chat_template.render(tokenizer, given(USER, ANSWER))[0].startswith("01 Mar 2025<user>")
    assert chat_template.asks_for_date(tokenizer)
    assert not chat_template.asks_for_date(chat.tokenizer())


def test_a_named_template_that_is_no_text_is_refused() -> None:
    tokenizer = chat.tokenizer()
    tokenizer.chat_template = {"default": chat.DATED, "a": 1}
    with pytest.raises(InputError, match=r"'a' is 1, expected the text of a template"):
        chat_template.freeze_date(tokenizer)


def test_content_is_given_as_parts_where_the_template_takes_nothing_else() -> None:
    """Such a template wrote no word of content that is text: every message was left out."""
    turns = given(USER, ANSWER, {"role": "user", "content": ""}, {"role": "assistant", "content": "b"})
    text, notes, answers = rendered(chat.PARTS, turns)
    assert text == "<user>q</end><assistant>a</end><user></end><assistant>b</end>"
    assert answers == ["a</end>", "b</end>"]
    assert notes == [template_call.PARTS]
    assert rendered(chat.ECHO, turns)[1] == []


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f"}}]])
def test_named_templates_without_a_default_are_named(tools: Any) -> None:
    tokenizer = chat.tokenizer()
    tokenizer.chat_template = {"rag": chat.ECHO, "tool_use": chat.TOOLS}
    turns = given(USER, ANSWER).with_tools(tools)
    if tools:
        assert chat_template.render(tokenizer, turns)[0].endswith("<user>q</end><assistant>a</end>")
        return
    with pytest.raises(
        RowError, match=r"chat templates named 'rag', 'tool_use' and none named 'default': give the one"
    ):
        chat_template.render(tokenizer, turns)
    tokenizer.chat_template = {"rag": chat.TOOLS, "default": chat.ECHO}
    assert chat_template.render(tokenizer, turns)[0] == "<user>q</end><assistant>a</end>"
