"""The report's tables as rows of text; every format prints them, so numbers can't differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from requant_eval.escaping import markdown, markdown_block
from requant_eval.gate import gate_words, is_counted
from requant_eval.metrics.facts import Facts, base_and_adapter, known_facts
from requant_eval.metrics.records import Estimate
from requant_eval.report.number_format import format_bytes, format_estimate, format_seconds
from requant_eval.report.recommend import option_words
from requant_eval.report.records import GateResult, Report

WORST_MODULES = 10
SILENT = frozenset(("", "unknown", "not measured", "no"))
LABELS = ("what", "name", "source", "engine", "variant")
"""Keys whose value names a mapping in a list."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A title, column names, rows of as many cells each, and a note under it.

    text: how many leading columns are words. words: names of later ones that are; all others are numbers. Measured
    values come right after the first column, since a narrow screen shows only these two. key: the figure that belongs
    to the table, if any.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    text: int = 1
    words: tuple[str, ...] = ()
    key: str = ""

    def is_words(self, index: int) -> bool:
        """Whether a column holds words."""
        return index < self.text or self.columns[index] in self.words

    def informative(self) -> Table:
        """The same table without the columns that say nothing in any row; the first one stays."""
        silent = [set(cells) <= SILENT for cells in zip(*self.rows, strict=True)]
        return self.select(*(c for i, c in enumerate(self.columns) if not i or not silent[i])) if silent else self

    def select(self, *columns: str) -> Table:
        """The same table with only these columns."""
        kept = [self.columns.index(name) for name in columns]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return replace(self, columns=columns, rows=rows)

    def markdown(self) -> str:
        """A pipe table with its title above and its note below."""
        align = ["---" if self.is_words(i) else "---:" for i in range(len(self.columns))]
        columns, *rows = ([markdown(cell) for cell in row] for row in (self.columns, *self.rows))
        table = "\n".join(f"| {' | '.join(line)} |" for line in (columns, align, *rows))
        title = f"### {markdown(self.title)}\n\n" if self.title else ""
        return title + table + (f"\n\n{markdown_block(self.note)}" if self.note else "")


def gates_table(report: Report) -> Table:
    """Every gate: its limit, what was measured, its status."""
    rows = []
    for g in report["gates"]:
        unit = f" {g['unit']}" if g["unit"] else ""
        whose = f" of {g['relative_to']}'s" if g["relative_to"] else ""
        bound = f"{'<=' if g['side'] == 'max' else '>='} {g['limit']:g}{unit}{whose}"
        between = not is_counted(g["metric"])
        value = format_estimate(g["estimate"], unit=unit, interval=between) if g["estimate"] else _unmeasured(g)
        more = f", about {g['more_documents']} more documents" if g["more_documents"] else ""
        rows.append((gate_words(g["metric"]), value, bound, g["status"].upper() + more, g["set"], str(g["variant"])))
    note = "A gate passes when its whole 95 % interval keeps the limit, fails when the whole interval breaks it."
    return Table(
        title="Gates",
        columns=("metric", "measured", "limit", "status", "set", "variant"),
        rows=tuple(rows),
        note=note,
        words=("status", "set", "variant"),
    )


def _unmeasured(gate: GateResult) -> str:
    """Why a gate has no number, in two words; the verdict says it in full."""
    return "not defined" if "not defined" in gate["text"] else "not measured"


def options_table(report: Report) -> Table:
    """The ways to deploy: needs, size, loss, speed."""
    options, facts = report["recommendation"]["options"], known_facts(report["facts"])
    names = [s["name"] for s in report["sets"]]
    with_speed = any(o["tokens_per_second"] for o in options)
    rows = [
        (
            option_words(facts, o["name"])
            + (" (recommended)" if o["name"] == report["recommendation"]["choice"] else ""),
            *(_option_loss(o["loss"].get(name)) for name in names),
            format_bytes(o["bytes"]) if o["bytes"] else "unknown",
            *([_speed(o["tokens_per_second"])] if with_speed else []),
            o["needs"],
            o["multi_adapter"],
        )
        for o in options
    ]
    losses = tuple(f"perplexity, {name}" for name in names)
    columns = (
        "way",
        *losses,
        "weights",
        *(["tokens/s, one sequence"] if with_speed else []),
        "needs to serve",
        "many adapters",
    )
    note = (
        f"Perplexity against {base_and_adapter(facts)}. Weights: bytes on disk, and about that in memory; the cache "
        "for the context comes on top in all three. transformers loads the requantized checkpoint too, with gptqmodel."
    )
    words = ("needs to serve", "many adapters")
    return Table(title="Ways to deploy", columns=columns, rows=tuple(rows), note=note, words=words).informative()


def modules_table(facts: Facts, *, most: int = WORST_MODULES) -> Table:
    """The modules with the largest relative output error, worst first, at most so many."""
    modules = (facts.get("quantize") or {}).get("modules") or []
    known = [(m, float(error)) for m in modules if (error := m.get("relative_error")) is not None]
    known.sort(key=lambda found: -found[1])
    worst: list[Mapping[str, object]] = [m for m, _ in known[:most]]
    optional = {
        "relative_error": "relative error",
        "rtn_error": "RTN's",
        "signal_to_noise": "adapter/noise",
        "loss": "loss",
        "bits": "bits",
        "group_size": "group",
        "damp": "damp",
        "fallback": "fallback",
    }
    shown = [key for key in optional if any(m.get(key) is not None for m in worst)]
    rows = tuple((str(m.get("name", "?")), *(_cell(m.get(key)) for key in shown)) for m in worst)
    every = len(rows) == len(modules) > WORST_MODULES
    title = f"All {len(rows)} modules" if every else f"The {len(rows)} worst of {len(modules)} modules"
    note = (
        "Relative error: sqrt(tr(E H E') / tr(W H W')) on the calibration data; E: error of W, H: Hessian; "
        "RTN's: of rounding to nearest; adapter/noise: the signal to noise of the adapter; loss: tr(E H E'); "
        "damp: the share of H's mean diagonal that was added to it."
    )
    columns = ("module", *(optional[key] for key in shown))
    return Table(title=title, columns=columns, rows=rows, note=note, key="modules").informative()


def cost_tables(facts: Facts) -> list[Table]:
    """Bytes of every artifact; seconds and peak memory (also GPU memory) of every stage."""
    cost = facts.get("cost") or {}
    sizes = tuple((name, format_bytes(n)) for name, n in (cost.get("bytes") or {}).items() if n is not None)
    columns: list[tuple[str, Mapping[str, float], Callable[[float], str]]] = [
        ("time", cost.get("seconds") or {}, format_seconds),
        ("peak memory", cost.get("peak_rss") or {}, format_bytes),
    ]
    if on_device := cost.get("peak_device"):
        columns.append(("peak GPU memory", on_device, format_bytes))
    known = [(values, shown) for _, values, shown in columns]
    stages = tuple(
        (name, *(shown(values[name]) if values.get(name) is not None else "" for values, shown in known))
        for name in dict.fromkeys(name for values, _ in known for name in values)
    )
    tables = [
        Table(title="Size", columns=("artifact", "bytes"), rows=sizes),
        Table(title="Time and memory", columns=("stage", *(title for title, _, _ in columns)), rows=stages),
    ]
    return [table for table in tables if table.rows]


def facts_table(title: str, facts: object, *, skip: Sequence[str] = ()) -> Table:
    """Any mapping as name and value; nested names are joined with a dot."""
    rows = tuple((name, text) for name, text in _flat(facts) if name.split(".")[0] not in skip)
    return Table(title=title, columns=("fact", "value"), rows=rows, text=2)


def _option_loss(estimate: Estimate | None) -> str:
    if estimate is None:
        return "not measured"
    if estimate["value"] == estimate["se"] == 0:
        return "0 % (the reference)"
    return format_estimate(estimate, signed=True, unit=" %")


def _speed(speed: Mapping[str, float] | None) -> str:
    """One number for each engine."""
    return ", ".join(f"{engine} {_cell(value)}" for engine, value in (speed or {}).items()) or "not measured"


def _flat(value: object, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, Mapping):
        return [row for key, item in value.items() for row in _flat(item, f"{prefix}.{key}" if prefix else str(key))]
    if value is None or value == "" or value == []:
        return []
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [row for i, item in enumerate(value) for row in _flat(*_labelled(item, prefix, i))]
    return [(prefix, ", ".join(_cell(v) for v in value) if isinstance(value, list) else _cell(value))]


def _labelled(item: object, prefix: str, index: int) -> tuple[object, str]:
    """One item of a list with the prefix of its facts: the item's own name, else its number."""
    key = next((k for k in LABELS if isinstance(item, Mapping) and isinstance(item.get(k), str)), None)
    if key is None or not isinstance(item, Mapping):
        return item, f"{prefix}.{index + 1}"
    return {k: v for k, v in item.items() if k != key}, f"{prefix}.{item[key]}"


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
