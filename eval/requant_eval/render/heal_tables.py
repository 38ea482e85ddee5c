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
    skip = (
        "train",
        "held",
        "judged",
        "moved_most",
        "blocks",
        "overlap",
        "verify",
        "sources",
        "changed_codes",
        "passes",
    )
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
        _passes_table(facts),
        _blocks_table(facts),
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


def _passes_table(facts: HealFacts) -> Table:
    """What each of two passes did; empty after one."""
    how = {"blocks": "block by block", "whole": "end to end"}
    rows = tuple(
        (
            f"{', '.join(p['tuned'])}, {how.get(p['mode'], p['mode'])}",
            format_value(p["kl_start"]),
            format_value(p["kl_best"]),
            "kept" if p["healed"] else "gained nothing, not kept",
        )
        for p in facts.get("passes") or []
    )
    columns = ("pass", "KL before, nats/token", "after", "result")
    return Table(title="Passes of the healing", columns=columns, rows=rows, note="Each is judged on its own.")


def _blocks_table(facts: HealFacts) -> Table:
    """Error of every block before and after its healing; empty end to end."""
    rows = tuple(
        (
            str(b["block"]),
            format_value(b["start"]),
            format_value(b["best"]),
            str(b["best_step"]),
            "" if b.get("changed") is None else f"{b['changed']:.2%}",
        )
        for b in facts.get("blocks") or []
    )
    note = "Relative error of the block's output on held-out windows, given the output of the healed blocks before it."
    columns = ("block", "error before", "after", "at step", "changed codes")
    return Table(title="Blocks", columns=columns, rows=rows, note=note)


def _chosen(facts: HealFacts) -> str:
    """Which step was chosen, and what windows that were not looked at before say of it."""
    step = facts.get("chosen_step", facts.get("best_step"))
    text = f"The windows of this table chose step {step}; step 0 is the quantized checkpoint."
    judged = facts.get("judged")
    if not judged:
        return f"{text} They were looked at {len(facts.get('held') or [])} times: the least value is a little too good."
    start, chosen = (format_value(value) for value in judged)
    kept = "" if facts.get("best_step") == step else ", so the checkpoint stays as it was"
    if facts.get("passes"):  # each is judged on its own: their table says what was kept
        kept = ""
    return f"{text} {facts.get('judge_windows')} other windows judge it: {start} -> {chosen}{kept}."
