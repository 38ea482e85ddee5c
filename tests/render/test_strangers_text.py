"""Every text of a report replaced by hostile ones: no format lets them act."""

from __future__ import annotations

import copy
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from helpers.reports import FACTS, GATES, built
from rich.console import Console
from ruamel.yaml import YAML

from requant_eval.gate import parse
from requant_eval.render import ci, html, markdown, model_card, terminal
from requant_eval.report.assemble import conclude
from requant_eval.report.schema import check

PAYLOADS = (
    '"><script>alert(1)</script>',
    "<img src=x onerror=alert(4)>",
    "a\n---\nlicense: evil\n---\n# injected\n\n- item",
    "\x1b[31mRED\x1b]0;title\x07\x9b31m\u202eevil",
    "[x](http://evil) ![y](http://evil) [z][e]\n\n[e]: http://evil",
    "```\n<script>alert(2)</script>\n```",
    "`<i>`|a|b|\n|-|-|\nPASS: all is well",
    "[link=http://evil]x[/link][/red]",
)
FREE = {
    "status",
    "side",
    "metric",
    "unit",
    "relative_to",
    "kind",
    "variants",
    "protocol",
    "choice",
    "variant",
    "from",
    "to",
    "reference",
}
"""Keys whose texts are requant's own words: the schema knows them, or tables are looked up by them."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))
    if isinstance(value, str) and not FREE & set(path) and (path[:2] != ("recommendation", "options")):
        yield path


def poisoned(payload: str) -> dict[str, Any]:
    """A report whose every free text is the payload."""
    facts = copy.deepcopy(FACTS)
    facts["calibration"]["data"] = ["train.jsonl"]
    facts["suggestion"] = None
    report = copy.deepcopy(built(facts))
    for path in list(places(report)):
        holder = report
        for step in path[:-1]:
            holder = holder[step]
        holder[path[-1]] = payload
    report["schema_version"] = 2
    check(report)
    return report


class Tags(HTMLParser):
    """Tags of a page, and attributes that run code."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.running: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.running += [(tag, k) for k, v in attrs if k.startswith("on") or (v or "").startswith("javascript:")]


def outside_code(text: str) -> str:
    """Markdown without its fences and code spans."""
    text = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<!\\)`[^`\n]+`", "", text)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_format_lets_a_text_act(payload: str) -> None:
    report = poisoned(payload)
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None, record=True)
    console.print(terminal.table(report))
    console.print(terminal.decision(report))
    shown = {
        "terminal": console.export_text(styles=False),
        "md": markdown.render(report),
        "card": model_card.model_card(report),
        "summary": ci.summary(report),
        "html": html.render(report),
    }
    for name, text in shown.items():
        assert not set(text) & set("\x1b\x07\x9b\u202e"), name
        lines = outside_code(re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL))
        assert not re.search(r"^(license: evil|# injected|PASS: all)", lines, re.MULTILINE), name
    for name in ("md", "card", "summary"):
        live = outside_code(shown[name].split("\n---\n", 1)[-1] if name == "card" else shown[name])
        assert not re.search(r"<[A-Za-z/!]", live), name
        assert not re.search(r"(?<!\\)\]\(|(?<!\\)\]\[|^\[\w+\]:", live, re.MULTILINE), name
    tags = Tags(shown["html"])
    assert tags.running == []
    assert tags.tags.get("script") == Tags(html.render(built())).tags.get("script")
    assert {"img", "i", "a"} & tags.tags.keys() <= {"a"}
    ET.fromstring(ci.junit(report))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_front_matter_is_what_it_says(payload: str) -> None:
    """The set's and the report's names change values of the front matter, and nothing else."""
    report = built()
    report["name"] = payload
    report["facts"]["base"]["name"] = payload
    for s in report["sets"]:
        s["name"] = payload + s["name"]
    report = conclude(report, [])
    _, front, body = model_card.model_card(report).split("---\n", 2)
    data = YAML(typ="safe", pure=True).load(front)
    assert set(data) == {"library_name", "pipeline_tag", "tags", "model-index"}
    assert data["model-index"][0]["results"][0]["dataset"]["name"].isprintable()
    assert body.startswith("\n# ")
    assert "<" not in front


def test_numbers_are_not_touched() -> None:
    """Escapes are for strangers: intervals, signs and names of modules read as before."""
    text = markdown.render(built())
    assert "\\[" not in text.replace("\\|", "")
    assert "layers.14.down_proj" in text
    assert parse(GATES[0]).text.replace("at most", "<=").split(" ")[-1] in text
