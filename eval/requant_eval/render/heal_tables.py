"""Tables of healing: its effect on each set, the held-out curve, settings."""

from __future__ import annotations

from requant_eval.metrics.facts import HealFacts, HealSource, known_facts
from requant_eval.render.tables import Table, facts_table
from requant_eval.report.number_format import format_estimate, format_value
from requant_eval.report.records import Report


def heal_tables(report: Report) -> list[Table]:
    """Effect on each set, held-out curves, changed codes, settings; empty without healing."""
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
    skip = ("train", "held", "judged", "moved_most", "blocks", "overlap", "verify", "sources", "changed_codes")
    tables = [
        Table(title="Is any text worse off?", columns=("set", "ln perplexity by healing", "loss"), rows=tuple(guard)),
        Table(
            title="KL on held-out healing text",
            columns=("steps", "nats/token"),
            rows=curve,
            note=_chosen(facts),
            key="healing",
        ),
        *(_source_table(source) for source in facts.get("sources") or []),
        _codes_table(facts),
        facts_table("Settings and movement of the scales", facts, skip=skip),
    ]
    return [table for table in tables if table.rows]


def _source_table(source: HealSource) -> Table:
    """One source's KL and loss by step."""
    rows = tuple((str(int(n)), format_value(kl), format_value(loss)) for n, kl, loss in source["held"])
    read = "" if source["reads"] is None else f"Its text is read {source['reads']:.1f} times. "
    worse = "Other windows say that it became worse." if source["worse"] else ""
    columns = ("steps", "KL, nats/token", "loss against the teacher, nats/token")
    return Table(title=f"Held-out text of {source['name']}", columns=columns, rows=rows, note=f"{read}{worse}".strip())


def _codes_table(facts: HealFacts) -> Table:
    """How many codes changed, by distance; empty where none were trained."""
    codes = facts.get("changed_codes")
    rows = () if not codes else tuple((far, f"{count:,}") for far, count in codes["by"].items())
    note = "" if not codes else f"{codes['share']:.2%} of {codes['codes']:,} codes changed."
    return Table(title="Changed codes", columns=("distance", "codes"), rows=rows, note=note)


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
