"""The table of formats: one row a format, where there are several."""

from __future__ import annotations

from helpers.reports import FACTS, built

from requant_eval.render import markdown
from requant_eval.render.format_table import formats_table

GPTQ = {
    "directory": "healed", "bytes": 100_000_000, "bits_per_weight": 4.16, "read_by": ["vllm", "gptqmodel"],
    "made_from": None, "largest_rounding": 0.0, "loaded_in": ["transformers"],
}  # fmt: skip
GGUF = GPTQ | {
    "directory": "gguf", "read_by": [], "made_from": "healed", "largest_rounding": 0.0123, "loaded_in": [],
}  # fmt: skip


def test_a_row_says_where_how_large_who_reads_it_and_how_it_was_verified() -> None:
    table = formats_table({"formats": {"gptq": GPTQ, "gguf": GGUF}})  # type: ignore[typeddict-item]
    gptq, gguf = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert (gptq["format"], gptq["bytes"], gptq["bits a weight"]) == ("gptq", "100 MB", "4.16")
    assert (gptq["directory"], gptq["read by"]) == ("healed/", "vllm, gptqmodel")
    assert gptq["verified"] == "every tensor read back and decoded; loaded in transformers"
    assert (gguf["directory"], gguf["read by"]) == ("gguf/", "no known engine")
    assert gguf["verified"] == "every weight against healed/: 0.012 steps off at most"


def test_gptq_alone_needs_no_table() -> None:
    assert formats_table({"formats": {"gptq": GPTQ}}).rows == ()  # type: ignore[typeddict-item]
    assert formats_table({}).rows == ()
    assert "## Formats" not in markdown.render(built())  # type: ignore[arg-type]
    assert "## Formats" in markdown.render(built(FACTS | {"formats": {"gptq": GPTQ, "gguf": GGUF}}))  # type: ignore[arg-type]
