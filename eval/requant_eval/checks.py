"""What loading the checkpoint proved: a table of the engines that read it, for the report and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from requant_eval.digits import format_seconds
from requant_eval.tables import Table

COLUMNS = ("read by", "kernel", "dtype", "perplexity", "ln perplexity, from ours", "tolerance", "load")


def checks_table(facts: Mapping[str, Any]) -> Table:
    """Our decoding first, then every engine: the kernel's own step after gptq. Empty when nothing was verified."""
    proof = facts.get("verify") or {}
    if proof.get("perplexity") is None:
        return Table("In each engine", COLUMNS, ())
    ours = ("our decoding", "plain weights", "float32", f"{proof['perplexity']:.4f}", "", "", "")
    rows = [ours, *(_row(e) for e in proof.get("engines") or [])]
    note = (
        f"Checked: {proof['tensors']} tensors and {proof['linears']} packed linears against the format and the merged "
        f"model; perplexity of the same {proof['sample_tokens']} tokens, 8 tokens generated."
    )
    return Table("In each engine", COLUMNS, tuple(rows), note, text=3)


def _row(engine: Mapping[str, Any]) -> tuple[str, ...]:
    names = ", ".join(f"{k} {v}" for k, v in engine["versions"].items() if k != "torch") or engine["engine"]
    if engine["error"] is not None:
        return (names, "does not load", engine["dtype"], "", "", "", "")
    same = "" if engine["ok"] else " (too far)"
    return (
        names,
        ", ".join(engine["kernels"]),
        f"{engine['dtype']} on {engine['device']}",
        f"{engine['perplexity']:.4f}",
        f"{engine['difference']:+.2g}{same}",
        f"{engine['tolerance']:g}",
        format_seconds(engine["load_seconds"]),
    )
