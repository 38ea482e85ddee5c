"""The table of a run's inputs: base, adapters, their match, the loss on their own text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from requant_eval.metrics.facts import Facts
from requant_eval.render.tables import Table, facts_table


def inputs_table(facts: Facts, *, created: bool = False) -> Table:
    """Base and adapter of a run; created: also when it was made."""
    adapter = facts.get("adapter")
    told = adapter if isinstance(adapter, Mapping) else {}
    rest = {key: value for key, value in told.items() if key not in ("match", "probe")} if told else adapter
    base = facts.get("base")
    choice = base.get("choice") if isinstance(base, Mapping) else None
    plain = {key: value for key, value in base.items() if key != "choice"} if isinstance(base, Mapping) else base
    inputs = {"base": plain, "adapter": rest, "created": facts.get("created") if created else None}
    table = facts_table("Inputs", inputs)
    rows = [*table.rows]
    at = next((i for i, (name, _) in enumerate(rows) if name == "created"), len(rows))
    rows[at:at] = [("match", _match(m)) for m in _mappings(told.get("match"))]
    rows += _chosen(choice) if isinstance(choice, Mapping) else []
    rows += [(f"loss on {p.get('source', 'its own text')}", _probe(p)) for p in _mappings(told.get("probe"))]
    return Table(title=table.title, columns=table.columns, rows=tuple(rows), text=2)


def _chosen(choice: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `merge.onto: auto` took, why, and the losses of both merges on each set."""
    rows = [("merged onto (auto)", f"{choice.get('onto')}: {choice.get('why')}")]
    for found in _mappings(choice.get("sets")):
        losses, ends = found.get("losses"), found.get("interval")
        losses = losses if isinstance(losses, Mapping) else {}
        seen, original = (_number(losses.get(key)) for key in ("dequantized", "original"))
        value = _number(found.get("difference"), "+")
        low, high = (_number(end, "+") for end in (ends if isinstance(ends, list | tuple) and len(ends) == 2 else "??"))
        size = f"{found.get('documents')} documents, {found.get('tokens')} tokens"
        text = f"{seen} nats a token onto dequantized, {original} onto original: {value} ({low} to {high}); {size}"
        rows.append((f"both merges on {found.get('set')}", text))
    return rows


def _number(found: object, sign: str = "") -> str:
    return f"{found:{sign}.4f}" if isinstance(found, float | int) and math.isfinite(found) else "not known"


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
