"""Ten questions of newcomers: two links from the README, one from docs/index.md."""

from __future__ import annotations

import re

import pytest
from test_docs import ROOT, anchors, links

README = ROOT / "README.md"
INDEX = ROOT / "docs" / "index.md"
QUESTIONS = {
    # question: (word of the README's line that a reader looks for, the section, what it must say)
    "which group size": (r"groups", "docs/choosing.md#which-group-size", r"divide the widths"),
    "which base": (r"base in 4 bits", "docs/quickstart.md#how-did-training-hold-the-base", r"`none`"),
    "out of memory": (r"out of memory", "docs/troubleshooting.md#memory", r"evaluate\.window"),
    "INCONCLUSIVE": (r"INCONCLUSIVE", "docs/troubleshooting.md#the-verdict", r"held-out"),
    "does vLLM load it": (r"engine loads what", "docs/serving.md#which-server-loads-it", r"vLLM and SGLang load"),
    "how long": (r"how long", "docs/hardware.md#time", r"measured"),
    "which rows": (r"which rows", "docs/texts.md#rows", r"messages"),
    "how to gate in CI": (r"gates in CI", "docs/gates.md#in-ci", r"requant run recipe\.yaml --junit"),
    "two adapters": (r"two adapters", "docs/examples.md#two-adapters-in-one-model", r"adapters:"),
    "GGUF": (r"GGUF", "docs/formats.md#gguf", r"llama\.cpp"),
}


def target(page: str, link: str) -> str:
    """The page of the repository that a link of another one leads to."""
    file = link.partition("#")[0]
    path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
    return str(path.relative_to(ROOT))


def section(text: str, anchor: str) -> str:
    """From the heading of an anchor up to the next of its level."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    return next(part for part in parts if anchor in anchors(part))


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_readme_leads_to_the_answer(question: str) -> None:
    word, place, says = QUESTIONS[question]
    page, _, anchor = place.partition("#")
    lines = [line for line in README.read_text().splitlines() if re.search(word, line)]
    first = {target("README.md", link) for line in lines for link in links(line)}
    second = {target(step, link) for step in first if step.endswith(".md") for link in links((ROOT / step).read_text())}
    assert page in first | second
    assert re.search(says, section((ROOT / page).read_text(), anchor))


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_index_has_the_answer_itself(question: str) -> None:
    """One link, to the section: a row of the first table names the question."""
    rows = re.findall(r"^\| ([^|]*) \| ([^|]*) \|$", INDEX.read_text(), re.MULTILINE)
    places = [link for asked, answer in rows if question in asked for link in links(answer)]
    assert QUESTIONS[question][1].removeprefix("docs/") in places


def test_a_missing_answer_is_seen() -> None:
    assert "nothing" not in anchors((ROOT / "docs" / "choosing.md").read_text())
    with pytest.raises(StopIteration):
        section("## A\n\ntext\n", "b")
