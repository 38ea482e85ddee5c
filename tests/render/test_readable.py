"""Reports as read: no Python values, nothing said twice, measured values beside their names."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import pytest
from helpers.reports import FACTS, built, full
from rich.console import Console

from requant_eval.render import document, html, input_tables, markdown, model_card, terminal
from requant_eval.render.document import Section
from requant_eval.render.set_tables import set_tables, variants_table, waterfall_table
from requant_eval.render.tables import Table, facts_table, gates_table, modules_table, options_table

MATCH = {
    "agree": 2, "of": 3,
    "signs": [{"what": "names", "agrees": True, "note": "all found"}, {"what": "shapes", "agrees": True, "note": "fit"},
              {"what": "base name", "agrees": False, "note": "other"}, {"what": "revision", "agrees": None, "note": "?"}],
}  # fmt: skip
PROBE = {
    "source": "train.jsonl",
    "without": 5.972032853201324,
    "with_adapter": 5.1596709499172135,
    "moved": 0.40870474577,
}
LIVED_IN = FACTS | {
    "base": {"name": "org/pico-nf4", "nf4": "pre-quantized"},
    "adapter": {"name": "mine", "match": [MATCH], "probe": [PROBE]},
    "merge": {"untied": False, "ledger": {"copied": 3}, "odd": [{"what": "x", "n": 1.23456789012345}, {"n": None}]},
    "verify": {"perplexity": 6.5, "tensors": 63, "linears": 14, "sample_tokens": 247, "engines": []},
}
FORMATS: list[Callable[[Any], str]] = [markdown.render, html.render, model_card.model_card]


@pytest.mark.parametrize("render", FORMATS)
def test_no_python_values_and_no_float_of_16_digits(render: Callable[[Any], str]) -> None:
    text = render(built(LIVED_IN))
    text = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", text, flags=re.DOTALL)
    said = re.sub(r"<[^>]*>", " ", text)
    assert not re.search(r"\{&#39;|\{'|\[\{|\bNone\b|\bTrue\b|\bFalse\b|np\.float", said)
    assert not re.search(r"\d\.\d{9}", said)
    assert "2 of 3 signs agree (names, shapes); different: base name; not known: revision" in said
    assert "5.972 nats a token without the adapter, 5.16 with it; predictions moved by 0.4087" in said


def test_inputs_of_older_reports_are_names() -> None:
    assert input_tables.inputs_table({"base": "b", "adapter": "a"}).rows == (("base", "b"), ("adapter", "a"))
    assert input_tables.inputs_table({}).rows == ()


def test_lists_of_facts_are_rows_of_their_own() -> None:
    rows = facts_table("Merge", {"odd": [{"what": "x", "n": 1.5, "ok": True}, {"n": 2}, {"what": "y"}]}).rows
    assert rows == (("odd.x.n", "1.5"), ("odd.x.ok", "yes"), ("odd.2.n", "2"))


def test_columns_that_say_nothing_are_left_out() -> None:
    s = built()["sets"][0]
    assert "bits/byte" in variants_table(s).columns
    for v in s["variants"]:
        v["bits_per_byte"] = None
    assert variants_table(s).columns == ("variant", "perplexity", "nats/token", "top-1 right", "tokens")
    modules = [{"name": f"m{i}", "relative_error": 0.1 * i, "fallback": i == 3} for i in range(1, 5)]
    assert "fallback" in modules_table({"quantize": {"modules": modules}}).columns
    modules[2]["fallback"] = False
    assert modules_table({"quantize": {"modules": modules}}).columns == ("module", "relative error")
    assert Table(title="t", columns=("a", "b"), rows=()).informative().columns == ("a", "b"), (
        "of no rows nothing is known"
    )
    assert Table(title="t", columns=("a", "b"), rows=(("", ""),)).informative().columns == ("a",)


def test_no_table_repeats_the_heading_above_it() -> None:
    for render in (built(), full(), built(LIVED_IN)):
        for section in document.document(render).sections:
            titles = [block.title for block in section.blocks if isinstance(block, Table)]
            assert [t for t in titles if t.lower().startswith(section.title.lower())] == []
    assert "### Gates" not in markdown.render(built())
    assert "### in-domain" not in markdown.render(built())
    kept = document._under_heading(Section("gptq", (Table(title="gptq in each engine", columns=(), rows=()),)))
    assert [b.title for b in kept.blocks if isinstance(b, Table)] == ["gptq in each engine"]


def test_the_measured_value_is_the_second_column() -> None:
    report = full()
    assert gates_table(report).columns[:2] == ("metric", "measured")
    assert options_table(report).columns[1].startswith("perplexity, ")
    assert waterfall_table(report["sets"][0]).columns[:2] == ("step", "perplexity")
    for table in (gates_table(report), options_table(report), *(t for s in report["sets"] for t in set_tables(s))):
        assert not table.is_words(1), table.title
        assert all(re.match(r"[-+]?\d|not ", row[1]) for row in table.rows), table.title
        assert f"| {' | '.join(table.columns)} |" in table.markdown()


@pytest.mark.parametrize("width", [30, 60, 80, 120])
def test_names_numbers_and_intervals_stay_whole_on_a_terminal(width: int) -> None:
    report = full()
    console = Console(width=width, file=io.StringIO())
    console.print(terminal.table(report))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert all(len(line.rstrip()) <= width for line in shown.splitlines())
    words = set(shown.split())
    for s in report["sets"]:
        cells = [
            cell
            for t in (variants_table(s), waterfall_table(s))
            for row in t.select(*t.columns[:2]).rows
            for cell in row
        ]
        assert [part for cell in cells for part in cell.split() if part not in words] == []
    if width >= 60:
        values = re.findall(
            r"\[[-+\d.]+, [-+\d.]+\]", markdown.render(report).split("### What each step")[1].split("\n\n")[1]
        )
        perplexities = values[::2]
        assert perplexities
        assert [v for v in perplexities if v not in shown] == [], "an interval is on one line"
