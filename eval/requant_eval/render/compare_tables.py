"""A comparison of runs as tables and as a document."""

from __future__ import annotations

from typing import cast

from rich.console import Group
from rich.text import Text

from requant_eval.escaping import everywhere
from requant_eval.render.document import Bullets, Document, Section
from requant_eval.render.tables import Table
from requant_eval.render.terminal import shown
from requant_eval.report.compare import Comparison, Pair
from requant_eval.report.compare_roads import ComparedRoad
from requant_eval.report.number_format import format_bytes, format_estimate, format_seconds

UNDECIDED = "cannot be told apart"


def runs_table(comparison: Comparison) -> Table:
    """Every run: perplexity by shared set, size, time, and whether it is on the Pareto front."""
    names = [s["name"] for s in comparison["sets"]]
    rows = tuple(
        (
            f"{run['name']}",
            run["variant"],
            run["status"],
            *(format_estimate(run["sets"][name]["ppl"]) for name in names),
            format_bytes(run["bytes"]) if run["bytes"] is not None else "unknown",
            format_seconds(run["seconds"]) if run["seconds"] is not None else "unknown",
            _front(run["dominated_by"]),
        )
        for run in comparison["runs"]
    )
    columns = ("run", "variant", "gates", *(f"perplexity, {name}" for name in names), "weights", "time", "Pareto front")
    note = (
        "Time: merge, quantize, heal. On the Pareto front: no other run is smaller and better, or one of them and "
        "equal in the rest, by the values; whether a difference is real is the table of pairs."
    )
    return Table(title="Runs", columns=columns, rows=rows, note=note, text=3)


def pairs_table(comparison: Comparison) -> Table:
    """Who is better on which set, paired by document."""
    rows = tuple(
        (
            s["name"],
            f"{pair['b']} against {pair['a']}",
            pair["better"] or _undecided(pair),
            format_estimate(pair["delta"], signed=True),
            format_estimate(pair["percent"], signed=True, unit=" %"),
        )
        for s in comparison["sets"]
        for pair in s["pairs"]
    )
    columns = ("set", "pair", "better", "ln perplexity", "perplexity")
    note = "Paired by document; brackets are 95 % intervals; negative: the first named is better."
    return Table(title="Who is better", columns=columns, rows=rows, note=note, text=3)


def tasks_table(comparison: Comparison) -> Table:
    """Who is better on which task, paired by document."""
    rows = tuple(
        (
            task["name"],
            f"{pair['b']} against {pair['a']}",
            pair["better"] or UNDECIDED,
            format_estimate(pair["difference"], factor=task["scale"], signed=True),
            ", ".join(format_estimate(task["scores"][run], factor=task["scale"]) for run in (pair["b"], pair["a"])),
            "" if pair["p"] is None else f"{pair['p']:.2g}",
        )
        for task in comparison.get("tasks", [])
        for pair in task["pairs"]
    )
    columns = ("task", "pair", "better", "points", "scores", "p")
    note = "Paired by document; brackets are 95 % intervals. p: McNemar's exact test."
    return Table(title="Tasks", columns=columns, rows=rows, note=note, text=3, words=("scores",))


def roads_table(comparison: Comparison) -> Table:
    """Every run's ways to ship: loss on a shared set, multiple of what the run ships, size."""
    roads = comparison.get("roads", [])
    rows = tuple(
        (
            road["run"],
            f"{road['name']} (ships)" if road["ships"] else road["name"],
            "not measured" if road["loss"] is None else format_estimate(road["loss"], signed=True, unit=" %"),
            _times(road),
            format_bytes(road["bytes"]) if road["bytes"] is not None else "unknown",
        )
        for road in roads
    )
    home = roads[0]["set"] if roads else ""
    columns = ("run", "road", f"perplexity, {home}", "times what ships", "weights")
    note = (
        "Other ways to ship the same fine-tune, against each run's own reference; not paired between runs: "
        "RUN:ROAD compares one with any variant of another run."
    )
    return Table(title="Roads", columns=columns, rows=rows, note=note, text=2)


def _times(road: ComparedRoad) -> str:
    """A road's loss as a multiple of what its run ships."""
    if road["ships"]:
        return ""
    return "not defined" if road["times"] is None else format_estimate(road["times"], unit=" x")


def line(comparison: Comparison) -> str:
    """The comparison in one line."""
    said = []
    for s in comparison["sets"]:
        best = _best([run["name"] for run in comparison["runs"]], s["pairs"])
        said.append(f"{s['name']}: {best} is best" if best else f"{s['name']}: no run is surely best")
    return "; ".join(said) + "."


def document(comparison: Comparison) -> Document:
    """The comparison for Markdown and HTML."""
    comparison = cast("Comparison", everywhere(comparison))
    tokens = ", ".join(f"{s['name']}: {s['n_documents']} documents, {s['n_scored']} tokens" for s in comparison["sets"])
    left = (Bullets(tuple(comparison["left_out"])),) if comparison["left_out"] else ()
    sections = (
        Section("Warnings", (Bullets(tuple(comparison["warnings"])),) if comparison["warnings"] else ()),
        Section("Who is better", (pairs_table(comparison),)),
        Section("Tasks", (tasks,) if (tasks := tasks_table(comparison)).rows else ()),
        Section("Roads", (roads,) if (roads := roads_table(comparison)).rows else ()),
        Section("Runs", (runs_table(comparison),)),
        Section("Not in all runs, left out", left),
    )
    return Document(
        headline=line(comparison),
        title=" / ".join(run["name"] for run in comparison["runs"]),
        about=f"Paired on the same tokens; {tokens}.",
        sections=tuple(s for s in sections if s.blocks),
    )


def terminal(comparison: Comparison) -> Group:
    """The comparison on a terminal."""
    comparison = cast("Comparison", everywhere(comparison))
    warnings = [Text(f"warning: {warning}", style="yellow") for warning in comparison["warnings"]]
    left = [Text(f"Not in all runs, left out: {', '.join(comparison['left_out'])}.")] if comparison["left_out"] else []
    tables = shown(pairs_table(comparison), tasks_table(comparison), roads_table(comparison), runs_table(comparison))
    return Group(Text(line(comparison), style="bold"), *warnings, *tables, *left)


def _best(names: list[str], pairs: list[Pair]) -> str | None:
    """The run that is surely better than each other one."""
    return next((n for n in names if all(p["better"] == n for p in pairs if n in (p["a"], p["b"]))), None)


def _undecided(pair: Pair) -> str:
    return "equal" if pair["delta"]["value"] == pair["delta"]["se"] == 0 else UNDECIDED


def _front(dominated_by: str | None) -> str:
    return "yes" if dominated_by is None else dominated_by if dominated_by == "unknown" else f"no: {dominated_by}"
