"""`requant_eval.escaping`: strangers' text cannot act where it is shown."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from requant_eval import escaping
from requant_eval.escaping import fenced, markdown, markdown_block, one_line, visible

NASTY = st.text(
    st.sampled_from("ab \n\r\t\x1b\x00\x07\x7f\x85\x9b\u2028\u202e\u200b\ufeff\ufffe\ud800<>[]()!|`*_#-=~:&;\\'\"{}")
)


@given(NASTY | st.text())
def test_a_terminal_gets_nothing_to_obey(text: str) -> None:
    shown = visible(text)
    assert shown.replace("\n", "").replace("\t", "").isprintable() or all(
        ord(c) not in range(32) and ord(c) not in range(127, 160) for c in shown.replace("\n", "").replace("\t", "")
    )
    assert not set(shown) & set("\u202e\u202a\u2066\u200b\u200e\ufeff\ud800\ufffe\x9b\x85\u2028")
    shown.encode()
    assert len(one_line(text).splitlines()) <= 1
    assert visible(shown) == shown


def test_letters_of_the_world_stay() -> None:
    text = "Grüße, 你好, नमस्ते, مرحبا, שלום, 👩\u200d💻, a\u00a0b"
    assert one_line(text) == text


@given(NASTY)
def test_xml_takes_it(text: str) -> None:
    element = ET.Element("a", {"b": one_line(text)})
    element.text = visible(text)
    assert ET.fromstring(ET.tostring(element, encoding="unicode")).get("b") == one_line(text)


MARKDOWN = {
    "<script>alert(1)</script>": "&lt;script>alert(1)&lt;/script>",
    "a <!-- b": "a &lt;!-- b",
    "[x](http://evil)": r"[x\](http://evil)",
    "![x](http://evil)": r"![x\](http://evil)",
    "[x][y]": r"[x\][y]",
    "3.5 [3.4, 3.6] <= 5 %": "3.5 [3.4, 3.6] <= 5 %",
    "q_proj and _x_ and *.y": r"q_proj and \_x\_ and \*.y",
    "a|b\\|c": r"a\|b\\\|c",
    "&lt;b&gt; & c": "&amp;lt;b&amp;gt; & c",
    "x\n---\nlicense: evil": "x --- license: evil",
    "set `gates:` or `a": r"set `gates:` or \`a",
    "`<b>`": r"\`&lt;b>\`",
}


@pytest.mark.parametrize("text", MARKDOWN)
def test_markdown_shows_the_text(text: str) -> None:
    assert markdown(text) == MARKDOWN[text]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("# x", r"\# x"),
        ("- x", r"\- x"),
        ("---", r"\---"),
        ("> x", r"\> x"),
        ("1. x", r"1\. x"),
        ("===", r"\==="),
        ("[a]: http://evil", r"\[a]: http://evil"),
        ("~~~", r"\~\~~"),
        ("-0.5 % less", "-0.5 % less"),
        ("1.5 % more", "1.5 % more"),
    ],
)
def test_a_paragraph_stays_one(text: str, shown: str) -> None:
    assert markdown_block(text) == shown


@given(NASTY)
def test_a_fence_holds(text: str) -> None:
    first, *body, last = fenced(text, "yaml").split("\n")
    assert first == last + "yaml"
    assert set(last) == {"`"}
    assert all(last not in line for line in body)


@given(st.dictionaries(st.text(min_size=1), st.text() | st.lists(st.text()) | st.integers()))
def test_yaml_reads_back(data: dict[str, Any]) -> None:
    text = escaping.yaml(data)
    assert YAML(typ="safe", pure=True).load(text) == data
    assert "<" not in text
    assert visible(text) == text


@given(NASTY | st.text())
def test_json_reads_back(text: str) -> None:
    shown = escaping.in_json(json.dumps([text], ensure_ascii=False, indent=1))
    assert json.loads(shown) == [text]
    assert visible(shown) == shown


@given(st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=("Cs",))))
def test_a_quoted_key_reads_back(text: str) -> None:
    shown = escaping.quoted(text)
    assert YAML(typ="safe", pure=True).load(f"{shown}: 1") == {text: 1}
    assert "\n" not in shown
    assert shown.isascii()


def test_everywhere_keeps_lines_where_asked() -> None:
    data = {"a\nb": ["c\nd", 1], "recipe": "e\nf\x1b", "g": {"recipe": None}}
    assert escaping.everywhere(data, whole=frozenset({"recipe"})) == {
        "a b": ["c d", 1], "recipe": "e\nf\\x1b", "g": {"recipe": None},
    }  # fmt: skip
