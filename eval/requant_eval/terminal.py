"""The report on a terminal: the headline, then the tables that decide, with rich."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from requant_eval.tables import Table, divergence_table, retention_table, variants_table, waterfall_table


def table(report: Mapping[str, Any]) -> Group:
    """Headline, warnings, and for every set perplexity, steps, KL and retention; fits 80 columns."""
    parts: list[RenderableType] = [Text(report["headline"], style="bold")]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in report["warnings"]]
    for s in report["sets"]:
        tables = (
            variants_table(s).select("variant", "perplexity", "top-1 right", "tokens"),
            waterfall_table(s).select("step", "what", "perplexity"),
            divergence_table(s).select("variant", "mean KL", "p99", "same top-1"),
            retention_table(s),
        )
        for content in tables:
            if content.rows:
                parts += [Text(), _rich(content)]
    return Group(*parts)


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
