"""Table and conclusion of the roads: what ships against what people would otherwise ship."""

from __future__ import annotations

from requant_eval.metrics.facts import base_and_adapter
from requant_eval.render.tables import Table
from requant_eval.report.number_format import format_bytes, format_estimate
from requant_eval.report.records import Report, Road

WORDS = {
    "merged": "the merged model in 16 bit",
    "gptq": "GPTQ, this run",
    "healed": "GPTQ, healed, this run",
    "ends": "this run, with rounded embeddings and head",
    "rtn": "rounding to nearest at the same bits",
    "nf4-merge": "PEFT's `merge_and_unload` on the base in bitsandbytes' 4 bits",
    "nf4-again": "the merged model, loaded in bitsandbytes' 4 bits",
    "gptqmodel": "GPTQ of the merged model by gptqmodel's defaults",
}


def home_set(report: Report) -> str:
    """The name of the in-domain set."""
    return next((s["name"] for s in report["sets"] if s["in_domain"]), report["sets"][0]["name"])


def label(road: Road) -> str:
    """A road's name, and whether it is what ships."""
    return f"{road['name']} (ships)" if road["ships"] else road["name"]


def conclusion(report: Report) -> str:
    """Which road loses surely less than what ships in no more bytes, on the in-domain set."""
    roads, home = report.get("roads") or [], home_set(report)
    ships = next((road for road in roads if road["ships"]), None)
    if ships is None:
        return ""
    better = [road["name"] for road in roads if _beats(road, ships, home)]
    if better:
        return (
            f"On {home}, {' and '.join(better)} lose{'s' if len(better) == 1 else ''} surely less than what ships "
            f"({ships['name']}) in no more bytes: ship that, or give what ships more bits or healing."
        )
    if all(road["times"].get(home) is None for road in roads):
        return f"On {home} what ships ({ships['name']}) has no sure loss that others could be compared with."
    return f"On {home}, no road loses surely less than what ships ({ships['name']}) in no more bytes."


def _beats(road: Road, ships: Road, home: str) -> bool:
    times, size, most = road["times"].get(home), road["bytes"], ships["bytes"]
    sure = times is not None and times["high"] is not None and times["high"] < 1
    return sure and not road["ships"] and size is not None and most is not None and size <= most


def roads_table(report: Report) -> Table:
    """One row a road: losses, KL, multiple of the loss of what ships, size."""
    roads, home = report.get("roads") or [], home_set(report)
    names = sorted((s["name"] for s in report["sets"]), key=lambda name: name != home)
    rows = tuple(
        (
            label(road),
            *(_loss(road, name) for name in names),
            _cell(road, format_estimate(kl, interval=False) if (kl := road["kl"].get(home)) else ""),
            _cell(road, _times(road, home)),
            format_bytes(road["bytes"]) if road["bytes"] else "unknown",
            format_bytes(road["unquantized"]) if road["unquantized"] is not None else "",
        )
        for road in roads
    )
    columns = ("road", *(f"perplexity, {name}" for name in names), "KL", "times what ships", "weights", "unquantized")
    note = (
        f"Perplexity against {base_and_adapter(report['facts'])}. KL and times on {home}. Times: loss in ln perplexity "
        "as a multiple of the loss of what ships, paired; not defined where that is no sure loss. Weights: bytes of "
        "the tensors as they lie on disk; unquantized: of these, what is not in few bits."
    )
    return Table(title="Roads", columns=columns, rows=rows, note=note, key="roads").informative()


def card_table(report: Report, final: str | None) -> Table:
    """One row a road that was measured: loss on the in-domain set and size. final: the variant of the card."""
    home = home_set(report)
    rows = tuple(
        (
            WORDS.get(road["name"], road["name"]) + (" (this checkpoint)" if road["name"] == final else ""),
            _loss(road, home),
            format_bytes(road["bytes"]) if road["bytes"] else "unknown",
        )
        for road in report.get("roads") or []
        if road["variant"]
    )
    note = f"Other ways to ship this fine-tune, each against {base_and_adapter(report['facts'])} on the same tokens."
    return Table(
        title="Other ways to ship it", columns=("road", f"perplexity, {home}", "weights"), rows=rows, note=note
    )


def road_lines(report: Report) -> list[str]:
    """Of each road: what it is, who computed it with which settings, or why it was not measured."""
    found = []
    for road in report.get("roads") or []:
        parts = [WORDS.get(road["name"], ""), road["by"], road["settings"]]
        parts += [f"not measured: {road['missing']}"] if road["missing"] else []
        found.append(f"{road['name']}: {'; '.join(part for part in parts if part)}")
    return found


def _loss(road: Road, name: str) -> str:
    loss = road["loss"].get(name)
    return "not measured" if loss is None else format_estimate(loss, signed=True, unit=" %")


def _cell(road: Road, text: str) -> str:
    return text if road["variant"] else "not measured"


def _times(road: Road, home: str) -> str:
    times = road["times"].get(home)
    return "" if road["ships"] else "not defined" if times is None else format_estimate(times, unit=" x")
