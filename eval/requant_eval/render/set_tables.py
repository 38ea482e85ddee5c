"""Tables of one evaluation set: perplexity, steps, KL, flips, retention, other metrics."""

from __future__ import annotations

from requant_eval.gate import METRICS, Metric
from requant_eval.metrics.lookup import find_estimate
from requant_eval.metrics.records import Edge, Estimate, EvaluationSet, KernelStep
from requant_eval.render.tables import Table
from requant_eval.report.number_format import format_estimate, format_value

KINDS = {
    "learned": "what training learned",
    "merge": "merge + cast",
    "quantize": "quantization",
    "heal": "healing",
    "ends": "rounding of embeddings and head",
    "total": "whole way",
    "control": "control",
    "fork": "merged onto the original base",
    "road": "another road",
    "kernel": "served",
}


def set_tables(s: EvaluationSet) -> list[Table]:
    """All tables of one evaluation set of the report, empty ones left out."""
    tables = [variants_table(s), waterfall_table(s), divergence_table(s), flips_table(s), retention_table(s)]
    tables += [more_metrics_table(s), groups_table(s), reverted_table(s)]
    return [table for table in tables if table.rows]


def variants_table(s: EvaluationSet) -> Table:
    """Perplexity of every variant."""
    rows = [
        (
            v["name"],
            format_estimate(v["ppl"]),
            format_estimate(v["mean_nll"]),
            format_estimate(v["bits_per_byte"]) if v["bits_per_byte"] else "unknown",
            format_estimate(v["top1_accuracy"], factor=100, unit=" %", interval=False),
            str(v["n"]),
        )
        for v in s["variants"]
    ]
    columns = ("variant", "perplexity", "nats/token", "bits/byte", "top-1 right", "tokens")
    note = f"{protocol(s)}; {s['n_documents']} documents; brackets are 95 % intervals."
    return Table(title=f"{s['name']}: perplexity", columns=columns, rows=tuple(rows), note=note).informative()


def waterfall_table(s: EvaluationSet) -> Table:
    """What each step costs, paired on the same tokens."""
    steps: list[Edge | KernelStep] = [*s["edges"], *served(s)]
    rows = [
        (
            f"{e['from']} -> {e['to']}",
            format_estimate(e["loss_percent"], signed=True, unit=" %"),
            format_estimate(e["delta"], signed=True),
            what(e),
        )
        for e in steps
    ]
    columns = ("step", "perplexity", "ln perplexity", "what")
    note = "Paired; steps add up in ln perplexity, negative is better."
    if served(s):
        note += " Served: the engine's own computation against ours, on the beginnings of some documents."
    return Table(
        title=f"{s['name']}: what each step costs", columns=columns, rows=tuple(rows), note=note, words=("what",),
        key="steps",
    )  # fmt: skip


def served(s: EvaluationSet) -> list[KernelStep]:
    """The steps into engines (`metrics.engine_step.steps`); reports of older versions have none."""
    return list(s.get("kernels") or [])


def what(e: Edge | KernelStep) -> str:
    """What a step does."""
    if e["kind"] != "kernel":
        return KINDS[e["kind"]]
    return f"{KINDS['kernel']} in {e['dtype']} on {e['device']}, {e['n_documents']} documents"


def divergence_table(s: EvaluationSet) -> Table:
    """KL(reference || variant) and top-1 agreement with the reference."""
    rows = []
    for e in s["edges"]:
        if (kl := e["kl"]) is None:
            continue
        ladder = tuple(format_value(kl[k]) for k in ("median", "p90", "p95", "p99", "p99_9", "max"))
        agreement = format_estimate(e["agreement"], factor=100, unit=" %")
        rows.append((e["to"], format_estimate(kl["mean"]), *ladder, agreement))
    columns = ("variant", "mean KL", "median", "p90", "p95", "p99", "p99.9", "max", "same top-1")
    note = f"KL({s['reference']} || variant) per token, nats."
    return Table(
        title=f"{s['name']}: distance from {s['reference']}", columns=columns, rows=tuple(rows), note=note, key="kl"
    )


def flips_table(s: EvaluationSet) -> Table:
    """Tokens whose top-1 prediction became wrong or right."""
    rows = [
        (
            f"{e['from']} -> {e['to']}",
            format_estimate(e["right_to_wrong"], factor=100, unit=" %"),
            format_estimate(e["wrong_to_right"], factor=100, unit=" %"),
        )
        for e in s["edges"]
    ]
    columns = ("step", "right -> wrong", "wrong -> right")
    note = "Share of scored tokens, top-1 against the text."
    return Table(title=f"{s['name']}: flips", columns=columns, rows=tuple(rows), note=note, key="flips")


def retention_table(s: EvaluationSet) -> Table:
    """How much of what the adapter learned is left."""
    rows = [(name, format_estimate(kept, factor=100, unit=" %")) for name, kept in s["retention"].items()]
    note = "1 - ln(ppl variant / adapter) / ln(ppl base / adapter); not defined if the adapter gains nothing."
    return Table(
        title=f"{s['name']}: retention", columns=("variant", "of what the adapter learned"), rows=tuple(rows), note=note
    )


def more_metrics_table(s: EvaluationSet) -> Table:
    """The metrics of `gate.METRICS` that no other table shows, by variant."""
    metrics = [m for m in METRICS.values() if not m.own_table]
    rows = []
    for v in s["variants"]:
        found = [
            find_estimate(s, v["name"], of=m.of, key=m.key, part=m.part)
            for m in metrics
            if m.of != "task"
            if m.of != "answers"
        ]
        if any(found):
            rows.append((v["name"], *(_metric_cell(estimate, m) for estimate, m in zip(found, metrics, strict=True))))
    columns = ("variant", *(m.words for m in metrics))
    return Table(title=f"{s['name']}: other metrics", columns=columns, rows=tuple(rows))


def _metric_cell(estimate: Estimate | None, metric: Metric) -> str:
    if estimate is None:
        return "not measured"
    unit = f" {metric.unit}" if metric.unit else ""
    return format_estimate(estimate, factor=metric.scale, signed=metric.signed, unit=unit)


def groups_table(s: EvaluationSet) -> Table:
    """Loss of each variant by how much the adapter changed the token."""
    tails = s["tails"]
    if not tails:
        return Table(title=f"{s['name']}: loss by what the adapter changed", columns=(), rows=())
    shown = [name for name in tails["variants"] if name not in ("merged", "original")]
    rows = tuple(
        (
            f"{i + 1} of {len(tails['groups'])}",
            *(format_estimate(tails["variants"][name]["loss"][i], signed=True) for name in shown),
            f"{group['low']:.3g} to {group['high']:.3g}",
            str(group["n"]),
        )
        for i, group in enumerate(tails["groups"])
    )
    columns = ("tokens by change", *(f"{name}: nats/token lost" for name in shown), "ln p changed by", "tokens")
    note = "Tokens sorted by |ln p adapter - ln p base|, least changed first; loss against the adapter."
    return Table(
        title=f"{s['name']}: loss by what the adapter changed", columns=columns, rows=rows, note=note, key="tails"
    )


def reverted_table(s: EvaluationSet) -> Table:
    """How much of the adapter's change each variant took back."""
    variants = s["tails"]["variants"] if s["tails"] else {}
    rows = tuple(
        (
            name,
            format_estimate(v["reverted"], factor=100, unit=" %"),
            format_estimate(v["last_share"], factor=100, unit=" %") if v["last_share"] else "no sure loss",
        )
        for name, v in variants.items()
    )
    note = (
        "Taken back: how much of the adapter's change of each token's ln p the variant undoes (least squares); 0 % has "
        "nothing to do with what was learned, 100 % is the base again; strong noise raises it too, since a token that "
        "the adapter made sure can only lose. A loss spread evenly has 10 % on the tenth."
    )
    columns = ("variant", "adapter's changes taken back", "of its loss on the most changed tenth")
    return Table(title=f"{s['name']}: learned behaviour or noise", columns=columns, rows=rows, note=note)


def protocol(s: EvaluationSet) -> str:
    """The protocol of a set and its fingerprint, one short phrase."""
    bos = "BOS in every window" if s["bos"] else "no BOS added"
    return f"Protocol {s['protocol']}, windows of {s['window']}, {bos}, fingerprint {s['fingerprint']}"
