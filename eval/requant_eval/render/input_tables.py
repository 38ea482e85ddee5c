"""The table of a run's inputs: base, adapters, their match, the loss on their own text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from requant_eval.metrics.facts import Facts
from requant_eval.render.tables import Table, facts_table


def inputs_table(facts: Facts, *, created: bool = False) -> Table:
    """Base and adapter of a run; created: also when it was made."""
    adapter = facts.get("adapter")
    told = adapter if isinstance(adapter, Mapping) else {}
    rest = {key: value for key, value in told.items() if key not in ("match", "probe")} if told else adapter
    inputs = {"base": facts.get("base"), "adapter": rest, "created": facts.get("created") if created else None}
    table = facts_table("Inputs", inputs)
    rows = [*table.rows]
    at = next((i for i, (name, _) in enumerate(rows) if name == "created"), len(rows))
    rows[at:at] = [("match", _match(m)) for m in _mappings(told.get("match"))]
    rows += [(f"loss on {p.get('source', 'its own text')}", _probe(p)) for p in _mappings(told.get("probe"))]
    return Table(title=table.title, columns=table.columns, rows=tuple(rows), text=2)


def _mappings(found: object) -> list[Mapping[str, Any]]:
    return [item for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []


def _match(match: Mapping[str, Any]) -> str:
    """How many signs say that the adapter belongs to the base, and which."""
    signs = _mappings(match.get("signs"))
    words = {
        said: ", ".join(str(s.get("what")) for s in signs if s.get("agrees") is agrees)
        for said, agrees in (("agree", True), ("different", False), ("not known", None))
    }
    text = f"{match.get('agree')} of {match.get('of')} signs agree" + (f" ({words['agree']})" if words["agree"] else "")
    return text + "".join(f"; {said}: {words[said]}" for said in ("different", "not known") if words[said])


def _probe(probe: Mapping[str, Any]) -> str:
    """Nats a token without and with the adapter."""
    numbers = [probe.get(key) for key in ("without", "with_adapter", "moved")]
    without, tuned, moved = (f"{n:.4g}" if isinstance(n, float | int) else "not measured" for n in numbers)
    return f"{without} nats a token without the adapter, {tuned} with it; predictions moved by {moved}"
