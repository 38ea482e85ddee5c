"""Tables of healing: its effect on each set, the held-out curve, settings."""

from __future__ import annotations

from requant_eval.metrics.facts import HealFacts, known_facts
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
    skip = ("train", "held", "judged", "moved_most", "blocks", "overlap", "verify")
    tables = [
        Table(title="Is any text worse off?", columns=("set", "ln perplexity by healing", "loss"), rows=tuple(guard)),
        Table(
            title="KL on held-out healing text",
            columns=("steps", "nats/token"),
            rows=curve,
            note=_chosen(facts),
            key="healing",
        ),
        facts_table("Settings and movement of the scales", facts, skip=skip),
    ]
    return [table for table in tables if table.rows]


def _chosen(facts: HealFacts) -> str:
    """Which step was chosen, and what windows that were not looked at before say of it."""
    step = facts.get("chosen_step", facts.get("best_step"))
    text = f"The windows of this table chose step {step}; step 0 is the quantized checkpoint."
    judged = facts.get("judged")
    if not judged:
        return f"{text} They were looked at {len(facts.get('held') or [])} times: the least value is a little too good."
    start, chosen = (format_value(value) for value in judged)
    kept = "" if facts.get("best_step") == step else ", so the checkpoint stays as it was"
    return f"{text} {facts.get('judge_windows')} other windows judge it: {start} -> {chosen}{kept}."
