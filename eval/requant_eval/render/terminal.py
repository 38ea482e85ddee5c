"""The report on a terminal, with rich: verdict, headline and the main tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from requant_eval.metrics.facts import known_facts
from requant_eval.render import adapter_tables
from requant_eval.render.answer_cards import answers_said
from requant_eval.render.document import readable
from requant_eval.render.set_tables import divergence_table, retention_table, variants_table, waterfall_table
from requant_eval.render.tables import Table, gates_table, options_table
from requant_eval.render.task_tables import SHORT, task_tables
from requant_eval.report.adapter_gain import BEWARE
from requant_eval.report.records import Report

STYLES = {"pass": "bold green", "fail": "bold red", "inconclusive": "bold yellow", "none": "dim"}


def table(report: Report) -> Group:
    """Verdict, warnings, and for every set perplexity, steps, KL and retention; fits 80 columns."""
    report = readable(report)
    parts: list[RenderableType] = [decision(report)]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in report["warnings"]]
    for s in report["sets"]:
        parts += shown(
            variants_table(s).select("variant", "perplexity", "top-1 right", "tokens"),
            waterfall_table(s).select("step", "perplexity", "what"),
            divergence_table(s).select("variant", "mean KL", "p99", "same top-1"),
            retention_table(s),
        )
    parts += shown(*(t.select(*SHORT) for t in task_tables(report)[:1]))
    if (answers := report.get("answers")) and answers["items"]:
        parts += [Text(), Text(f"answers: {' '.join(answers_said(answers))}")]
    if canaries := known_facts(report["facts"]).get("canaries"):
        parts += [Text(), Text(f"canaries: {adapter_tables.canaries_line(canaries)}")]
    return Group(*parts)


def decision(report: Report) -> Group:
    """Verdict, headline, gates, ways to deploy, recommendation; fits 80 columns."""
    report = readable(report)
    verdict = report["verdict"]
    doubted = verdict["status"] == "pass" and BEWARE in verdict["line"]
    return Group(
        Text(verdict["line"], style=STYLES["inconclusive" if doubted else verdict["status"]]),
        Text(report["headline"], style="bold"),
        *shown(
            gates_table(report).select("metric", "measured", "limit", "status", "set"),
            _options(report),
        ),
        Text(report["recommendation"]["text"]),
    )


def _options(report: Report) -> Table:
    """The ways to deploy in few columns."""
    table = options_table(report)
    kept = ("way", *(f"perplexity, {s['name']}" for s in report["sets"]), "weights")
    return table.select(*(column for column in kept if column in table.columns))


def shown(*tables: Table) -> list[RenderableType]:
    """Those with rows, each after an empty line."""
    return [part for content in tables if content.rows for part in (Text(), _rich(content))]


def suggestion(report: Report) -> RenderableType:
    """The table of `report --suggest`.

    The caller prints the patch, so that it can be copied.
    """
    found = known_facts(readable(report)["facts"])["suggestion"]
    if found is None or not found["units"]:
        return Text("Nothing to lift: everything has 8 bits.")
    shown = ("modules", "bits", "gain", "of the loss", "larger by", "in the patch")
    return _rich(adapter_tables.suggestion_table(found).select(*shown))


def _rich(content: Table) -> RenderableType:
    """A table as wide as needed, or with intervals under their values; words and numbers are never broken."""
    return Group(
        Text(content.title, style="italic"), _Fitting(content), *([Text(content.note)] if content.note else [])
    )


@dataclass(frozen=True)
class _Fitting:
    """A table's rows, laid out for the width of the console."""

    content: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        layouts = (self.content, _stacked(self.content))
        yield next((rows for t in layouts if (rows := _rows(t, width)) is not None), _lines(self.content))


def _rows(content: Table, width: int) -> RichTable | None:
    """The rows with unbroken words and numbers; None where they are wider than `width`."""
    least = [_least(content, i) for i in range(len(content.columns))]
    if sum(least) + 3 * len(least) + 1 > width:  # a blank on both sides of each column, one between two
        return None
    out = RichTable(box=box.SIMPLE)
    for number, column in enumerate(content.columns):
        words = content.is_words(number)
        justify: Literal["left", "right"] = "left" if words else "right"
        # Fold, never cut: half a number is a wrong number.
        out.add_column(Text(column), justify=justify, overflow="fold", min_width=least[number], no_wrap=not words)
    for row in content.rows:
        out.add_row(*(Text(cell) for cell in row))
    return out


def _least(content: Table, number: int) -> int:
    """Least width of a column: its longest word, or, of numbers, its longest line."""
    cells = [content.columns[number], *(row[number] for row in content.rows)]
    return max(len(part) for cell in cells for part in (cell.split() if content.is_words(number) else cell.split("\n")))


def _stacked(content: Table) -> Table:
    """The table with each interval under its value and long headings in two lines."""
    rows = tuple(
        tuple(c if content.is_words(i) else c.replace(" [", "\n[") for i, c in enumerate(row)) for row in content.rows
    )
    columns = tuple(c if content.is_words(i) else c.replace(", ", ",\n") for i, c in enumerate(content.columns))
    words = tuple(c for i, c in enumerate(columns) if content.is_words(i))
    return replace(content, columns=columns, rows=rows, words=words)


def _lines(content: Table) -> RenderableType:
    """A table too wide for the console: a paragraph a row, a line a value."""
    parts = []
    for first, *rest in content.rows:
        named = zip(content.columns[1:], rest, strict=True)
        parts.append("\n".join([first, *(f"  {name}: {cell}" for name, cell in named if cell)]))
    return Text("\n".join(parts))
