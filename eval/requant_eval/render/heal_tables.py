"""Tables of healing: its effect on each set, the held-out curve, settings."""

from __future__ import annotations

from requant_eval.metrics.facts import known_facts
from requant_eval.render.tables import Table, facts_table
from requant_eval.report.number_format import format_estimate, format_value
from requant_eval.report.records import Report


def heal_tables(report: Report) -> list[Table]:
    """Effect on each set, held-out KL by step, settings; empty without healing."""
    facts = known_facts(report["facts"]).get("heal")
    if not facts:
        return []
    guard = [
        (
            s["name"],
            format_estimate(e["delta"], signed=True),
            "rose" if (e["delta"]["low"] or 0) > 0 else "did not rise",
        )
        for s in report["sets"]
        for e in s["edges"]
        if e["kind"] == "heal"
    ]
    curve = tuple((str(step), format_value(value)) for step, value in facts.get("held") or [])
    best = f"The held-out windows chose step {facts.get('best_step')}; step 0 is the quantized checkpoint."
    skip = ("train", "held", "moved_most", "blocks", "overlap", "verify")
    tables = [
        Table(title="Is any text worse off?", columns=("set", "ln perplexity by healing", "loss"), rows=tuple(guard)),
        Table(
            title="KL on held-out healing text", columns=("steps", "nats/token"), rows=curve, note=best, key="healing"
        ),
        facts_table("Settings and movement of the scales", facts, skip=skip),
    ]
    return [table for table in tables if table.rows]
