"""`requant.data.conversation`: the forms in which rows hold conversations."""

from __future__ import annotations

import json
from typing import Any

import pytest

from requant.data.conversation import RowError, conversation, is_messages, prompt_and_answer, text_of, tools_of

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def messages(value: Any) -> list[Any]:
    found = conversation(value)
    assert found is not None
    return list(found.messages)


@pytest.mark.parametrize(
    "value",
    [
        [USER, ANSWER],
        json.dumps([USER, ANSWER]),
        [json.dumps(USER), json.dumps(ANSWER)],
        {"messages": [USER, ANSWER]},
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        [{"user": "q", "assistant": "a"}],
        [{"human": "q", "assistant": "a"}],
        [USER | {"content": [{"type": "text", "text": "q"}]}, ANSWER | {"content": ["a"]}],
        [USER | {"tool_calls": None}, ANSWER],
    ],
)
def test_one_conversation_in_many_forms(value: Any) -> None:
    assert messages(value) == [USER, ANSWER]


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "input_text", "text": "two"}]
    assert messages([USER | {"content": parts}, ANSWER])[0]["content"] == "one two"


def test_tool_calls_and_other_keys_reach_the_template() -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "why"}
    assert messages([USER, turn])[1] == turn | {"content": ""}
    reply = {"role": "tool", "tool_call_id": "1", "name": "f", "content": "42"}
    assert messages([USER, turn, reply])[2] == reply


@pytest.mark.parametrize(
    "turn",
    [
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": {"x": 1}}},
        {"role": "tool_call", "content": '[{"name": "f", "arguments": {"x": 1}}]'},
    ],
)
def test_old_forms_of_a_call_become_tool_calls(turn: dict[str, Any]) -> None:
    assert messages([USER, turn])[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    "calls",
    [
        [{"name": "f", "arguments": {"x": 1}}],
        [{"name": "f", "parameters": {"x": 1}}],
        '[{"function": {"name": "f", "arguments": {"x": 1}}, "type": "function"}]',
    ],
)
def test_flat_calls_and_calls_as_text_become_openais(calls: Any) -> None:
    assert messages([USER, {"role": "assistant", "content": None, "tool_calls": calls}])[1]["tool_calls"] == [CALL]


def test_a_call_without_a_name_is_what_the_assistant_wrote() -> None:
    for text in ('{"name": null, "arguments": null}', "[]"):
        assert messages([USER, {"from": "function_call", "value": text}])[1] == ANSWER | {"content": text}


def test_an_answer_of_json_is_an_answer() -> None:
    for text in (
        '[{"role": "admin", "name": "Bob"}]',
        '[{"from": "Berlin", "to": "Rome"}]',
        json.dumps([USER, ANSWER]),
    ):
        found = prompt_and_answer("extract", text)
        assert found is not None
        assert found.messages[-1] == {"role": "assistant", "content": text}
    assert not is_messages('[{"from": "Berlin", "to": "Rome"}]')


def test_what_tables_write_for_a_missing_value_is_null() -> None:
    assert text_of(float("nan")) is None
    assert prompt_and_answer("q", float("nan")) is None
    assert text_of(True) == "true"
    assert conversation([{"human": "q", "assistant": None}]) is None


def test_roles_in_any_case_and_pairs_of_input_and_output() -> None:
    assert messages([{"role": "Human", "content": "q"}, {"role": "ASSISTANT", "content": "a"}]) == [USER, ANSWER]
    assert messages([{"input": "q", "output": "a"}]) == [USER, ANSWER]
    assert messages({"role": ["user", "assistant"], "content": ["q", "a"]}) == [USER, ANSWER]
    wrapped = conversation({"system": "s", "tools": [CALL["function"]], "messages": [USER, ANSWER]})
    assert wrapped is not None
    assert (wrapped.messages[0]["content"], len(wrapped.tools or ())) == ("s", 1)


def test_a_result_that_is_an_object_is_its_json() -> None:
    assert (
        messages([USER, {"role": "tool", "content": {"type": "weather", "c": 4}}])[1]["content"]
        == '{"type": "weather", "c": 4}'
    )


def test_a_call_in_a_notation_of_its_own_is_what_the_assistant_wrote() -> None:
    assert messages([USER, {"from": "function_call", "value": "f(x=1)"}])[1] == ANSWER | {"content": "f(x=1)"}


def test_observations_are_tool_messages_and_unknown_roles_stay() -> None:
    turns = [{"from": "observation", "value": "42"}, {"role": "critic", "content": "no"}]
    assert [m["role"] for m in messages([USER, *turns])] == ["user", "tool", "critic"]


def test_weights_say_which_answers_are_learned() -> None:
    found = conversation([USER, ANSWER | {"weight": 0}, USER, ANSWER | {"weight": 1}, USER, ANSWER | {"train": False}])
    assert found is not None
    assert found.learned == (False, False, False, True, False, False)
    assert all(set(m) == {"role", "content"} for m in found.messages)


@pytest.mark.parametrize("value", [None, [], "", "  ", "[]", [USER, {"role": "assistant", "content": None}]])
def test_null_is_no_conversation(value: Any) -> None:
    assert conversation(value) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("hello", "expected a list of messages, found text"),
        ("[1", "its text begins like JSON and is none"),
        ([1], "message 1 is a number, expected an object with role and content"),
        ([USER, {"speaker": "x", "line": "y"}], "message 2 has speaker, line, expected role and content"),
        ([USER | {"content": [{"type": "image", "image": "x.png"}]}], "message 1: holds a part of type 'image'"),
        ([USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "part of type 'image_url'"),
        ([USER | {"content": {"a": 1}}], "message 1: expected text, found an object with a"),
        ([{"role": "user", "text": "q"}], "message 1 has role, text, expected its text as content"),
        ([USER | {"images": ["a.png"]}], "message 1 holds images"),
        ("[{'role': 'user', 'content': 'q'}]", "it looks like Python's repr"),
        ([{"role": 5, "content": "x"}], "message 1 has role, content, expected role and content"),
    ],
)
def test_what_is_no_conversation_is_said(value: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        conversation(value)


def test_prompt_and_answer_are_texts_or_messages() -> None:
    system = {"role": "system", "content": "s"}
    for prompt, answer in (("q", "a"), ([USER], "a"), ("q", [ANSWER]), (json.dumps([USER]), [ANSWER])):
        found = prompt_and_answer(prompt, answer)
        assert found is not None
        assert (list(found.messages), found.learned) == ([USER, ANSWER], (False, True))
    found = prompt_and_answer([system, USER, ANSWER, USER], [ANSWER], [("q", "a")])
    assert found is not None
    assert [m["role"] for m in found.messages] == [
        "user",
        "assistant",
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    assert found.learned[-1]
    assert prompt_and_answer(None, "a") is None
    assert prompt_and_answer("q", None) is None


def test_a_system_text_comes_first_unless_there_is_one() -> None:
    found = conversation([USER, ANSWER])
    assert found is not None
    led = found.led_by("be brief")
    assert [m["role"] for m in led.messages] == ["system", "user", "assistant"]
    assert led.learned == (False, False, True)
    assert led.led_by("other") == led
    assert found.led_by("") == found


@pytest.mark.parametrize("value", [[CALL], json.dumps([CALL]), [json.dumps(CALL)], CALL, [CALL["function"]]])
def test_tools_are_a_list_of_functions(value: Any) -> None:
    assert tools_of(value) == (CALL,)


def test_no_tools() -> None:
    assert [tools_of(v) for v in (None, "[]", [], "")] == [None] * 4
    with pytest.raises(RowError, match="tools: expected functions as objects, found text"):
        tools_of(["f"])
    with pytest.raises(RowError, match="tools: expected functions as objects, found null"):
        tools_of([None])
    with pytest.raises(RowError, match="tools: expected a list of functions, found text"):
        tools_of("f")


def test_text_of_a_cell() -> None:
    assert [text_of(v) for v in (None, "a", 3, ["a", "b"], [{"type": "text", "text": "a"}, {"text": "b"}])] == [
        None, "a", "3", "a\nb", "ab",
    ]  # fmt: skip
    assert is_messages([USER])
    assert is_messages(json.dumps([USER]))
    assert not any(map(is_messages, (None, "q", [], ["q"], [{"text": "q"}], "[1", ["{1"])))
