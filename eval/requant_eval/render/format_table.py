"""The table of the formats that a run wrote, for the report and the model card."""

from __future__ import annotations

from requant_eval.metrics.facts import Facts, FormatFacts
from requant_eval.render.tables import Table
from requant_eval.report.number_format import format_bytes

COLUMNS = ("format", "bytes", "bits a weight", "directory", "read by", "verified")
NOTE = (
    "One solve: every format holds the codes, scales and zero points that were scored as GPTQ. Bits a weight: of the "
    "quantized linears, scales and zero points included. Read by: what engines' sources say of this checkpoint."
)


def formats_table(facts: Facts) -> Table:
    """One row a format; empty where GPTQ is the only one."""
    formats = facts.get("formats") or {}
    rows = tuple(_row(name, found) for name, found in formats.items()) if formats.keys() - {"gptq"} else ()
    return Table(title="Formats", columns=COLUMNS, rows=rows, note=NOTE, words=("directory", "read by", "verified"))


def _row(name: str, found: FormatFacts) -> tuple[str, ...]:
    bits, size = found.get("bits_per_weight"), found.get("bytes")
    return (
        name,
        "" if size is None else format_bytes(size),
        "" if bits is None else f"{bits:.2f}",
        f"{found.get('directory', '')}/",
        ", ".join(found.get("read_by") or ()) or "no known engine",
        _verified(found),
    )


def _verified(found: FormatFacts) -> str:
    """What it was compared with, how exact that was, and what engines loaded it."""
    made_from, rounding = found.get("made_from"), found.get("largest_rounding") or 0.0
    exact = "exactly" if not rounding else f"{rounding:.2g} steps off at most"
    ends = [f"{name} rounded to {bits} bits" for name, bits in (found.get("ends") or {}).items()]
    parts = [f"every weight against {made_from}/: {exact}" if made_from else "every tensor read back and decoded"]
    loaded = found.get("loaded_in") or ()
    return "; ".join([*parts, *ends, *([f"loaded in {', '.join(loaded)}"] if loaded else [])])
