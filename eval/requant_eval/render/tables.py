"""The report's tables as rows of text. Markdown, terminal and model card print these, so their numbers can't
differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from requant_eval.report.number_format import format_bytes, format_estimate, format_seconds, format_value
from requant_eval.report.recommend import OPTIONS

WORST_MODULES = 10
KINDS = {
    "learned": "what training learned",
    "merge": "merge + cast",
    "quantize": "quantization",
    "heal": "healing",
    "total": "whole way",
    "control": "control",
    "fork": "merged onto the original base",
    "kernel": "served",
}


@dataclass(frozen=True)
class Table:
    """A title, column names, rows of as many cells each, and a line under it.

    text: how many leading columns are words; the others are numbers. key: names the table for whoever draws a figure
    of it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text: int = 1
    key: str = ""

    def select(self, *columns: str) -> Table:
        """The same table with only these columns."""
        kept = [self.columns.index(name) for name in columns]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return replace(self, columns=columns, rows=rows)

    def markdown(self) -> str:
        """A pipe table with its title above and its note below."""
        align = ["---:" if i >= self.text else "---" for i in range(len(self.columns))]
        lines = [self.columns, align, *([escape(cell) for cell in row] for row in self.rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"### {self.title}\n\n{table}" + (f"\n\n{self.note}" if self.note else "")


def set_tables(s: Mapping[str, Any]) -> list[Table]:
    """All tables of one evaluation set of the report, empty ones left out."""
    tables = [variants_table(s), waterfall_table(s), divergence_table(s), flips_table(s), retention_table(s)]
    tables += [groups_table(s), reverted_table(s)]
    return [table for table in tables if table.rows]


def gates_table(report: Mapping[str, Any]) -> Table:
    """Every gate: what it demands, what was measured, how it stands."""
    rows = []
    for g in report["gates"]:
        unit = f" {g['unit']}" if g["unit"] else ""
        whose = f" of {g['relative_to']}'s" if g["relative_to"] else ""
        bound = f"{'<=' if g['side'] == 'max' else '>='} {g['limit']:g}{unit}{whose}"
        value = format_estimate(g["estimate"], unit=unit) if g["estimate"] else "not measured"
        more = f", about {g['more_documents']} more documents" if g["more_documents"] else ""
        rows.append((g["metric"], g["set"], str(g["variant"]), g["status"].upper() + more, bound, value))
    note = "A gate passes when its whole 95 % interval keeps the limit, fails when the whole interval breaks it."
    return Table("Gates", ("metric", "set", "variant", "status", "limit", "measured"), tuple(rows), note, text=4)


def options_table(report: Mapping[str, Any]) -> Table:
    """The ways to deploy beside each other."""
    options = report["recommendation"]["options"]
    names = [s["name"] for s in report["sets"]]
    with_speed = any(o["tokens_per_second"] for o in options)
    rows = [
        (
            OPTIONS[o["name"]] + (" (recommended)" if o["name"] == report["recommendation"]["choice"] else ""),
            o["needs"],
            o["multi_adapter"],
            format_bytes(o["bytes"]) if o["bytes"] else "unknown",
            *(_option_loss(o["loss"].get(name)) for name in names),
            *([_speed(o["tokens_per_second"])] if with_speed else []),
        )
        for o in options
    ]
    losses = tuple(f"perplexity, {name}" for name in names)
    columns = (
        "way",
        "needs to serve",
        "many adapters",
        "weights",
        *losses,
        *(["tokens/s, one sequence"] if with_speed else []),
    )
    note = (
        "Perplexity against base + adapter. Weights: bytes on disk, and about that in memory; the cache for the context comes "
        "on top in all three. transformers loads the requantized checkpoint too, with gptqmodel."
    )
    return Table("Ways to deploy", columns, tuple(rows), note, text=3)


def variants_table(s: Mapping[str, Any]) -> Table:
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
    return Table(f"{s['name']}: perplexity", columns, tuple(rows), note)


def waterfall_table(s: Mapping[str, Any]) -> Table:
    """What each step costs, paired on the same tokens."""
    rows = [
        (
            f"{e['from']} -> {e['to']}",
            what(e),
            format_estimate(e["delta"], signed=True),
            format_estimate(e["loss_percent"], signed=True, unit=" %"),
        )
        for e in [*s["edges"], *served(s)]
    ]
    columns = ("step", "what", "ln perplexity", "perplexity")
    note = "Paired; steps add up in ln perplexity, negative is better."
    if served(s):
        note += " Served: the engine's own computation against ours, on the beginnings of some documents."
    return Table(f"{s['name']}: what each step costs", columns, tuple(rows), note, text=2, key="steps")


def served(s: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The steps into engines (see `requant_eval.served`); reports of older versions have none."""
    return list(s.get("kernels") or [])


def what(e: Mapping[str, Any]) -> str:
    """What a step does."""
    if e["kind"] != "kernel":
        return KINDS[e["kind"]]
    return f"{KINDS['kernel']} in {e['dtype']} on {e['device']}, {e['n_documents']} documents"


def divergence_table(s: Mapping[str, Any]) -> Table:
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
    return Table(f"{s['name']}: distance from {s['reference']}", columns, tuple(rows), note, key="kl")


def flips_table(s: Mapping[str, Any]) -> Table:
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
    return Table(f"{s['name']}: flips", columns, tuple(rows), note, key="flips")


def retention_table(s: Mapping[str, Any]) -> Table:
    """How much of what the adapter learned is left."""
    rows = [(name, format_estimate(kept, factor=100, unit=" %")) for name, kept in s["retention"].items()]
    note = "1 - ln(ppl variant / adapter) / ln(ppl base / adapter); not defined if the adapter gains nothing."
    return Table(f"{s['name']}: retention", ("variant", "of what the adapter learned"), tuple(rows), note)


def groups_table(s: Mapping[str, Any]) -> Table:
    """Loss of each variant by how much the adapter changed the token."""
    tails = s["tails"]
    if not tails:
        return Table(f"{s['name']}: loss by what the adapter changed", (), ())
    shown = [name for name in tails["variants"] if name not in ("merged", "original")]
    rows = tuple(
        (
            f"{i + 1} of {len(tails['groups'])}",
            f"{group['low']:.3g} to {group['high']:.3g}",
            str(group["n"]),
            *(format_estimate(tails["variants"][name]["loss"][i], signed=True) for name in shown),
        )
        for i, group in enumerate(tails["groups"])
    )
    columns = ("tokens by change", "ln p changed by", "tokens", *(f"{name}: nats/token lost" for name in shown))
    note = "Tokens sorted by |ln p adapter - ln p base|, least changed first; loss against the adapter."
    return Table(f"{s['name']}: loss by what the adapter changed", columns, rows, note, key="tails")


def reverted_table(s: Mapping[str, Any]) -> Table:
    """Whether what a variant lost is what the adapter learned, or noise."""
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
        "Taken back: how much of the adapter's change of each token's ln p the variant undoes (least squares); 0 % has nothing "
        "to do with what was learned, 100 % is the base again; strong noise raises it too, since a token that the adapter made "
        "sure can only lose. A loss spread evenly has 10 % on the tenth."
    )
    columns = ("variant", "adapter's changes taken back", "of its loss on the most changed tenth")
    return Table(f"{s['name']}: learned behaviour or noise", columns, rows, note)


def modules_table(facts: Mapping[str, Any], *, most: int = WORST_MODULES) -> Table:
    """The modules with the largest relative output error, worst first, at most so many."""
    modules = (facts.get("quantize") or {}).get("modules") or []
    known = [m for m in modules if m.get("relative_error") is not None]
    known.sort(key=lambda m: -float(m["relative_error"]))
    worst = known[:most]
    optional = {
        "bits": "bits",
        "group_size": "group",
        "relative_error": "relative error",
        "rtn_error": "RTN's",
        "signal_to_noise": "adapter/noise",
        "loss": "loss",
        "damp": "damp",
        "fallback": "fallback",
    }
    shown = [key for key in optional if any(m.get(key) is not None for m in worst)]
    rows = tuple((str(m.get("name", "?")), *(_cell(m.get(key)) for key in shown)) for m in worst)
    every = len(rows) == len(modules) > WORST_MODULES
    title = f"All {len(rows)} modules" if every else f"The {len(rows)} worst of {len(modules)} modules"
    note = "Relative error: sqrt(tr(E H E') / tr(W H W')) on the calibration data."
    return Table(title, ("module", *(optional[key] for key in shown)), rows, note, key="modules")


def cost_tables(facts: Mapping[str, Any]) -> list[Table]:
    """Bytes of every artifact; seconds and peak memory of every stage, that of the GPU where there was one."""
    cost = facts.get("cost") or {}
    sizes = tuple((name, format_bytes(n)) for name, n in (cost.get("bytes") or {}).items() if n is not None)
    columns = [("time", "seconds", format_seconds), ("peak memory", "peak_rss", format_bytes)]
    columns += [("peak GPU memory", "peak_device", format_bytes)] if cost.get("peak_device") else []
    known = [(cost.get(key) or {}, shown) for _, key, shown in columns]
    stages = tuple(
        (name, *(shown(values[name]) if values.get(name) is not None else "" for values, shown in known))
        for name in dict.fromkeys(name for values, _ in known for name in values)
    )
    tables = [
        Table("Size", ("artifact", "bytes"), sizes),
        Table("Time and memory", ("stage", *(title for title, _, _ in columns)), stages),
    ]
    return [table for table in tables if table.rows]


def facts_table(title: str, facts: Any, *, skip: Sequence[str] = ()) -> Table:
    """Any mapping as name and value; nested names are joined with a dot."""
    rows = tuple((name, text) for name, text in _flat(facts) if name.split(".")[0] not in skip)
    return Table(title, ("fact", "value"), rows, text=2)


def escape(text: str) -> str:
    """`text` on one line, safe inside a pipe table."""
    return text.replace("|", "\\|").replace("\n", " ")


def protocol(s: Mapping[str, Any]) -> str:
    """The protocol of a set and its fingerprint, one short phrase."""
    bos = "BOS in every window" if s["bos"] else "no BOS added"
    return f"Protocol {s['protocol']}, windows of {s['window']}, {bos}, fingerprint {s['fingerprint']}"


def _option_loss(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "not measured"
    if estimate["value"] == estimate["se"] == 0:
        return "0 % (the reference)"
    return format_estimate(estimate, signed=True, unit=" %")


def _speed(speed: Any) -> str:
    """One number for each engine."""
    return ", ".join(f"{engine} {_cell(value)}" for engine, value in (speed or {}).items()) or "not measured"


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [row for key, item in value.items() for row in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    if value is None or value == "" or value == []:
        return []
    return [(prefix, ", ".join(_cell(v) for v in value) if isinstance(value, list) else _cell(value))]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
