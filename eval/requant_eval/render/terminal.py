"""The report on a terminal, with rich: verdict, headline and the main tables."""

from __future__ import annotations

from typing import Literal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from requant_eval.metrics.facts import known_facts
from requant_eval.render import adapter_tables
from requant_eval.render.set_tables import divergence_table, retention_table, variants_table, waterfall_table
from requant_eval.render.tables import Table, gates_table, options_table
from requant_eval.report.records import Report

STYLES = {"pass": "bold green", "fail": "bold red", "inconclusive": "bold yellow", "none": "dim"}


def table(report: Report) -> Group:
    """Verdict, warnings, and for every set perplexity, steps, KL and retention; fits 80 columns."""
    parts: list[RenderableType] = [decision(report)]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in report["warnings"]]
    for s in report["sets"]:
        parts += shown(
            variants_table(s).select("variant", "perplexity", "top-1 right", "tokens"),
            waterfall_table(s).select("step", "what", "perplexity"),
            divergence_table(s).select("variant", "mean KL", "p99", "same top-1"),
            retention_table(s),
        )
    if canaries := known_facts(report["facts"]).get("canaries"):
        parts += [Text(), Text(f"canaries: {adapter_tables.canaries_line(canaries)}")]
    return Group(*parts)


def decision(report: Report) -> Group:
    """Verdict, headline, gates, ways to deploy, recommendation; fits 80 columns."""
    verdict = report["verdict"]
    losses = (f"perplexity, {s['name']}" for s in report["sets"])
    return Group(
        Text(verdict["line"], style=STYLES[verdict["status"]]),
        Text(report["headline"], style="bold"),
        *shown(
            gates_table(report).select("metric", "set", "status", "limit", "measured"),
            options_table(report).select("way", "weights", *losses),
        ),
        Text(report["recommendation"]["text"]),
    )


def shown(*tables: Table) -> list[RenderableType]:
    """Those with rows, each after an empty line."""
    return [part for content in tables if content.rows for part in (Text(), _rich(content))]


def suggestion(report: Report) -> RenderableType:
    """The table of `report --suggest`.

    The caller prints the patch, so that it can be copied.
    """
    found = known_facts(report["facts"])["suggestion"]
    if found is None or not found["units"]:
        return Text("Nothing to lift: everything has 8 bits.")
    shown = ("modules", "bits", "gain", "of the loss", "larger by", "in the patch")
    return _rich(adapter_tables.suggestion_table(found).select(*shown))


def _rich(content: Table) -> RichTable:
    out = RichTable(
        title=Text(content.title),
        caption=Text(content.note) if content.note else None,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE,
    )
    for number, column in enumerate(content.columns):
        # Fold, never cut: half a number is a wrong number.
        justify: Literal["left", "right"] = "left" if number < content.text else "right"
        out.add_column(Text(column), justify=justify, overflow="fold")
    for row in content.rows:
        out.add_row(*(Text(cell) for cell in row))
    return out
