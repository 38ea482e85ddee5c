"""Checks of answers without a judge: texts that pass, fail, or are not judged."""

from __future__ import annotations

from typing import Any

import pytest

from requant_eval.metrics import answer_checks as checks
from requant_eval.metrics import languages

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"enum": ["C", "F"]},
                "at": {"type": "array", "items": {"type": "number"}},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
LLAMA = '{"name": "weather", "parameters": {"city": "Bonn"}}'


@pytest.mark.parametrize(
    ("prompt", "text", "passes"),
    [
        ("user: 2+2?", "Four.", None),
        ("user: 2+2?", "<think>add</think>Four.", True),
        ("user: 2+2?", "<think>add and add and", False),
        ("user: 2+2?", "<think>a</think>x<think>b", False),
        ("assistant:<think>\n", "add</think>Four.", True),
        ("assistant:<think>\n", "add and add", False),
        ("user: what does <think> mean?\nassistant:", "A tag.", None),
        ("user: 2+2?", "[THINK]add[/THINK]4", True),
        ("user: 2+2?", "[THINK]add", False),
    ],
)
def test_an_opened_thought_is_closed(prompt: str, text: str, passes: bool | None) -> None:
    assert checks.thought_closed(text, prompt) is passes


@pytest.mark.parametrize(
    ("text", "expected", "passes"),
    [
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn", "days": 2}}\n</tool_call>', True, True),
        ('Let me look. <tool_call>{"name": "weather", "arguments": {"city": "Bonn"}}', True, True),
        ('{"name": "weather", "parameters": {"city": "Bonn", "unit": "C", "at": [1, 2.5]}}', True, True),
        ('<|python_tag|>{"name": "weather", "parameters": {"city": "Bonn"}}', True, True),
        ('```json\n[{"name": "weather", "arguments": {"city": "Bonn"}}]\n```', True, True),
        ('[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bonn"}}]', True, True),
        ('[TOOL_CALLS]weather[ARGS]{"city": "Bonn"}', True, True),
        (f"{LLAMA}; {LLAMA}", True, True),
        (f'{LLAMA};\n{{"name": "weather", "parameters": {{"city": "Aix; en"}}}};', True, True),
        (f'{LLAMA}; {{"name": "whether", "parameters": {{}}}}', True, False),
        (f"{LLAMA}; and so on", True, False),
        ('<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Bonn\\"}"}</tool_call>', True, True),
        ("It is warm.", False, None),
        ("It is warm.", True, False),
        ('<think><tool_call>{"name": 1}</tool_call></think>Warm.', False, None),
        ('<tool_call>{"name": "weather", "arguments": {"city": "Bonn"</tool_call>', True, False),
        ('<tool_call>{"name": "whether", "arguments": {"city": "Bonn"}}</tool_call>', True, False),
        ('<tool_call>{"name": "weather", "arguments": {"days": 2}}</tool_call>', True, False),
        ('<tool_call>{"name": "weather", "arguments": {"city": 5}}</tool_call>', True, False),
        ('<tool_call>{"name": "weather", "arguments": {"city": "Bonn", "days": true}}</tool_call>', True, False),
        ('<tool_call>{"name": "weather", "arguments": {"city": "Bonn", "days": 1.5}}</tool_call>', True, False),
        ('<tool_call>{"name": "weather", "arguments": {"city": "Bonn", "unit": "K"}}</tool_call>', True, False),
        ('<tool_call>{"name": "weather", "arguments": {"city": "Bonn", "at": ["1"]}}</tool_call>', True, False),
        ('<tool_call>{"name": "weather", "arguments": {"city": "Bonn", "when": 1}}</tool_call>', True, False),
        ('<tool_call>{"name": "weather", "arguments": ["Bonn"]}</tool_call>', True, False),
        (
            '<tool_call>{"name": "weather", "arguments": {"city": "Bonn"}}</tool_call><tool_call>no</tool_call>',
            True,
            False,
        ),
    ],
)
def test_a_tool_call_is_json_of_the_tools_schema(text: str, expected: bool, passes: bool | None) -> None:
    assert checks.tool_call(text, [WEATHER], expected=expected) is passes
    assert checks.tool_call(text, [], expected=expected) is None, "without tools there is nothing to judge by"


@pytest.mark.parametrize("tools", [["weather"], [{"function": {"name": 3}}], [{"name": "weather", "parameters": []}]])
def test_tools_of_another_shape_raise_nothing(tools: list[Any]) -> None:
    assert checks.tool_call('{"name": "weather", "arguments": {}}', tools, expected=True) in (True, False)


def test_a_notation_that_is_not_read_is_known() -> None:
    assert checks.reads_calls('<tool_call>{"name": "weather", "arguments": {}}</tool_call>')
    assert not checks.reads_calls("<function=weather><parameter=city>Bonn</parameter></function>")
    assert not checks.reads_calls("<tool_call><function=weather></function></tool_call>")


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Grüße, año", "Latin"),
        ("Привет", "Cyrillic"),
        ("你好世界", "Han"),
        ("日本語で書いた", "Kana"),
        ("カタカナ", "Kana"),
        ("안녕하세요", "Hangul"),
        ("مرحبا", "Arabic"),
        ("नमस्ते", "Devanagari"),
        ("Γειά", "Greek"),
        ("שלום", "Hebrew"),
        ("สวัสดี", "Thai"),
        ("ＡＢＣ", "Latin"),
    ],
)
def test_letters_belong_to_scripts(text: str, script: str) -> None:
    assert set(checks.scripts(text)) == {script}


@pytest.mark.parametrize(
    ("prompt", "own", "text", "passes"),
    [
        ("How do I boil an egg?", "", "Put it into water.", True),
        ("How do I boil an egg?", "", "放入水中煮十分钟左右即可", False),
        ("Как сварить яйцо в воде?", "", "Put it into water.", False),
        ("Translate: how do I boil an egg?", "Как сварить яйцо?", "Как сварить куриное яйцо?", True),
        ("卵のゆで方は？", "", "水に入れて十分間茹でてください。", True),
        ("Explain print() 用中文解释这个函数吧", "", "这个函数把文本写到标准输出", True),
        ("How many?", "", "42", None),
        ("2 + 2 =", "", "The answer is four.", None),
    ],
)
def test_the_script_is_the_prompts(prompt: str, own: str, text: str, passes: bool | None) -> None:
    assert checks.same_script(text, prompt, own) is passes


ENGLISH = (
    "To boil an egg, put it into a pot of cold water and bring the water to a boil. Then let it stand for a while."
)
GERMAN = "Um ein Ei zu kochen, legt man es in einen Topf mit Wasser. Danach wird es heiß, und es bleibt für zehn Minuten stehen."
SQL = "SELECT name FROM users WHERE age IN (1) AND name NOT LIKE 'a' ORDER BY name; SELECT id AS key FROM t"

CODE = "import os as o\ndef add(a, b):\n    return a + b\nfor i in range(o.cpu_count()):\n    print(add(a=i, b=i))\n"


@pytest.mark.parametrize(
    ("prompt", "own", "text", "passes"),
    [
        (GERMAN, "", GERMAN, True),
        (GERMAN, "", ENGLISH, False),
        (GERMAN, ENGLISH, ENGLISH, True),
        (GERMAN, "", "It is four.", None),
        ("Wie koche ich ein Ei?", "", ENGLISH, None),
        (GERMAN, "", SQL, None),
        (GERMAN, "", CODE, None),
        (GERMAN, "", f"```python\n# {ENGLISH}\n```", None),
    ],
)
def test_the_language_is_the_prompts(prompt: str, own: str, text: str, passes: bool | None) -> None:
    assert checks.same_language(text, prompt, own) is passes


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "Pour cuire un œuf, mettez-le dans une casserole d'eau froide et portez l'eau à ébullition, puis éteignez.",
            "French",
        ),
        (
            "Para cocer un huevo, ponlo en una olla con agua fría y lleva el agua a ebullición. Luego apaga el fuego.",
            "Spanish",
        ),
        (
            "Om een ei te koken, doe je het in een pan met koud water en breng je het water aan de kook in tien minuten.",
            "Dutch",
        ),
        ("Чтобы сварить яйцо, положите его в кастрюлю с холодной водой и доведите воду до кипения на огне.", "Russian"),
        ("Щоб зварити яйце, покладіть його в каструлю з холодною водою і доведіть до кипіння на вогні.", "Ukrainian"),
        (
            "Bir yumurtayı haşlamak için onu soğuk su dolu bir tencereye koyun ve on dakika kadar bu suda bekletin.",
            "Turkish",
        ),
    ],
)
def test_languages_are_known_by_their_commonest_words(text: str, name: str) -> None:
    assert languages.language(text) == name


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("", True),
        ("The cat sat on the mat. The dog sat on the rug.", True),
        ("no " * 11, True),
        ("no " * 12, False),
        ("I am a model. " * 3, True),
        ("I am a model. " * 4, False),
        ("Well: " + "I am a model. " * 3 + "I am a", True),
        ("Well: " + "I am a model. " * 4 + "I am", False),
        ("I am a model. " * 4 + "The end of it.", True),
        ("好的" * 6, False),
        ("It is.\n\n", True),
        ("It is." + " \n" * 20, False),
        (" " * 40, False),
        ("Title\n" + "-" * 80, True),
        ("a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4, False),
        (" ".join(str(n) for n in range(41)) * 4, True),
    ],
)
def test_a_loop_at_the_end_is_seen(text: str, passes: bool) -> None:
    assert checks.no_loop(text) is passes


def test_each_check_has_words_and_a_rule() -> None:
    assert checks.CHECKS.keys() == checks.RULES.keys()
    assert all(callable(getattr(checks, name)) for name in checks.CHECKS if name != "ended")


OK = [{"name": "f", "parameters": {"required": ["a"], "properties": {"a": {"type": "string"}}}}]
CALL = '<tool_call>{"name": "f", "arguments": {"a": "x"}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "prompt", "expected", "passes"),
    [
        ('maybe <tool_call>{"name": "f"}</tool_call> no.</think>' + CALL, "<assistant><think>\n", True, True),
        ("it never ends " + CALL, "<assistant><think>\n", True, False),
        ("<tool_call><function=f><parameter=a>x</parameter></function></tool_call>", "", False, None),
        ("<tool_call>f of x</tool_call>", "", True, False),
        ('{"name": "Bob", "age": 3}', "", False, None),
        ('{"name": "f"}', "", False, False),
        ('```json\n{"name": "f", "arguments": {"a": "x"}}\n```', "", True, True),
    ],
)
def test_what_is_thought_or_in_another_notation_is_no_call(
    text: str, prompt: str, expected: bool, passes: bool | None
) -> None:
    assert checks.tool_call(checks.after_thought(text, prompt), OK, expected=expected) is passes


def test_schemas_with_odd_entries_are_read_as_far_as_they_go() -> None:
    assert checks.fits({"required": [["a"], "b"]}, {"b": 1})
    assert not checks.fits({"required": [["a"], "b"]}, {"a": 1})
    assert not checks.fits({"enum": [1]}, True)
    assert checks.fits({"enum": [1]}, 1.0)


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("I am very sorry about that. " * 10 + "I am very sor", False),
        ("I am very sorry about that. " * 2 + "I am very sor", True),
        ("| a | b | c | d | e | f |\n|---|---|---|---|---|---|", True),
        ('"+" | "-" | ' * 9, False),
    ],
)
def test_a_loop_may_be_cut_and_a_tables_rule_is_none(text: str, passes: bool) -> None:
    assert checks.no_loop(text) is passes


@pytest.mark.parametrize("text", ["```json" + "\n" * 200_000 + "x", "<think>" * 100_000, "<think></think>" * 50_000])
def test_long_answers_are_read_in_one_pass(text: str) -> None:
    """Each took minutes while expressions began again at every mark."""
    assert checks.tool_call(text, OK, expected=False) is None
