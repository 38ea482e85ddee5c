"""`report.md`: the answer first, then the tables, then how to reproduce it and what it can't tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from requant_eval.card import model_card
from requant_eval.tables import cost_tables, facts_table, modules_table, set_tables

__all__ = ["model_card", "render"]

LIMITS = """\
- Losses hold for these texts, this tokenizer and this window length; another domain may lose more.
- Scoring is teacher-forced: every token is predicted from the true text. Errors that pile up while
  generating, and task accuracy, are not measured: run a task benchmark on the checkpoint.
- The weights were scored with this machine's kernels; a serving engine's kernels round differently.
- KL does not add up along the steps; ln perplexity does."""


def render(report: Mapping[str, Any]) -> str:
    """The whole report as Markdown. The first line is the headline."""
    parts = [report["headline"], f"# {report['name'] or 'Quality report'}"]
    if report["created"]:
        parts.append(f"Measured {report['created']}. Perplexities and losses on the same tokens for every variant.")
    if report["warnings"]:
        parts += ["## Warnings", "\n".join(f"- {warning}" for warning in report["warnings"])]
    for s in report["sets"]:
        mark = " (in-domain)" if s["in_domain"] and s["name"] != "in-domain" else ""
        parts.append(f"## {s['name']}{mark}")
        parts += [t.markdown() for t in set_tables(s)]
    parts += _facts(report["facts"])
    parts += ["## Reproduce", *_reproduce(report)]
    parts += ["## What this cannot tell you", LIMITS]
    return "\n\n".join(parts) + "\n"


def _facts(facts: Mapping[str, Any]) -> Iterator[str]:
    quantize = facts.get("quantize") or {}
    modules = modules_table(facts)
    if modules.rows:
        yield "## Modules"
        yield modules.markdown()
    cost = cost_tables(facts)
    if cost:
        yield "## Cost"
        yield from (t.markdown() for t in cost)
    described = [
        facts_table("Merge", facts.get("merge")),
        facts_table("Quantization", quantize, skip=("modules",)),
        facts_table("Calibration", facts.get("calibration")),
    ]
    if any(t.rows for t in described):
        yield "## Merge, quantization, calibration"
        yield from (t.markdown() for t in described if t.rows)


def _reproduce(report: Mapping[str, Any]) -> Iterator[str]:
    facts = report["facts"]
    inputs = {key: facts.get(key) for key in ("base", "adapter")}
    sets = {s["name"]: f"sha256 {s['digest']}, fingerprint {s['fingerprint']}" for s in report["sets"]}
    for t in (
        facts_table("Inputs", inputs),
        facts_table("Evaluation tokens", sets),
        facts_table("Versions", facts.get("versions")),
        facts_table("Hardware", facts.get("hardware")),
    ):
        if t.rows:
            yield t.markdown()
    if facts.get("recipe"):
        yield f"### Recipe\n\n```yaml\n{str(facts['recipe']).strip()}\n```"
