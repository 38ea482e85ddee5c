"""The table of engines that loaded the checkpoint, for the report and the model card."""

from __future__ import annotations

from requant_eval.metrics.facts import EngineFacts, ProofFacts
from requant_eval.metrics.records import Estimate
from requant_eval.render.tables import Table
from requant_eval.report.number_format import format_estimate, format_seconds

COLUMNS = (
    "read by",
    "perplexity",
    "ln perplexity, from ours",
    "tolerance",
    "load",
    "tokens/s, one sequence",
    "kernel",
    "dtype",
)


def checks_table(variant: str, proof: ProofFacts) -> Table:
    """Our decoding first, then every engine. Empty when nothing was scored."""
    title = f"{variant} in each engine"
    if proof.get("perplexity") is None:
        return Table(title=title, columns=COLUMNS, rows=())
    ours = ("our decoding", f"{proof['perplexity']:.4f}", "", "", "", "", "plain weights", "float32")
    rows = [ours, *(_row(e) for e in proof.get("engines") or [])]
    name = proof.get("sample_set")
    whose = f", beginnings of documents of {name}" if name else ""
    note = (
        f"Checked: {proof['tensors']} tensors and {proof['linears']} packed linears against the format and the merged "
        f"model; perplexity of the same {proof['sample_tokens']} tokens{whose}; 8 tokens generated."
    )
    table = Table(title=title, columns=COLUMNS, rows=tuple(rows), note=note, words=("kernel", "dtype"))
    return table.informative()


def _row(engine: EngineFacts) -> tuple[str, ...]:
    names = ", ".join(f"{k} {v}" for k, v in engine["versions"].items() if k != "torch") or engine["engine"]
    if engine["error"] is not None:
        return (names, "does not load", "", "", "", "", "", engine["dtype"])
    unpaired: Estimate = {"value": engine["difference"], "se": None, "low": None, "high": None}
    same = "" if engine["ok"] else " (too far)"
    return (
        names,
        f"{engine['perplexity']:.4f}",
        format_estimate(engine.get("delta") or unpaired, signed=True) + same,
        f"{engine['tolerance']:g}",
        format_seconds(engine["load_seconds"]),
        f"{speed:.4g}" if (speed := engine.get("tokens_per_second")) else "",
        ", ".join(engine["kernels"]),
        f"{engine['dtype']} on {engine['device']}",
    )
