"""`requant_eval.report.assemble`: reports of made-up scores, and the numbers of each format."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.reports import FACTS, SHIFT, built, result, scores
from rich.console import Console

from requant_eval.errors import EvaluationError
from requant_eval.metrics import set_metrics
from requant_eval.render import ci, markdown, model_card, terminal
from requant_eval.render.set_tables import divergence_table, variants_table
from requant_eval.render.tables import modules_table
from requant_eval.report.assemble import build, dumps, save, save_text
from requant_eval.report.headline import headline
from requant_eval.report.number_format import format_bytes, format_estimate, format_seconds, format_value


def edge(s: dict[str, Any], start: str, end: str) -> dict[str, Any]:
    return next(e for e in s["edges"] if (e["from"], e["to"]) == (start, end))


@pytest.mark.parametrize(("merged", "says"), [(104_000_000, False), (106_000_000, True)])
def test_the_headline_tells_of_no_saving_that_is_none(merged: int, says: bool) -> None:
    """A tiny model is mostly embeddings, which keep 16 bit."""
    report = built()
    sizes = report["facts"]["cost"]["bytes"]
    sizes["merged"] = merged
    assert sizes["gptq"] == 100_000_000
    assert ("times smaller" in headline(report)) is says


def test_headline_answers_in_one_sentence() -> None:
    report = built()
    number = r"[+-]?\d+(\.\d+)?"
    assert re.fullmatch(
        rf"GPTQ 4-bit g64 keeps {number} % \(95 % CI {number} to {number}\) of what the adapter learned; "
        rf"in-domain perplexity {number} % \[{number}, {number}\], general {number} % \[{number}, {number}\] "
        r"against base\+adapter; checkpoint 100 MB, 3\.0 times smaller than the merged one\.",
        report["headline"],
    )


def test_the_numbers_are_the_estimates() -> None:
    s = built()["sets"][1]
    assert s["in_domain"]
    total = edge(s, "adapter", "gptq")
    nll = {v["name"]: v["mean_nll"]["value"] for v in s["variants"]}
    assert total["delta"]["value"] == pytest.approx(nll["gptq"] - nll["adapter"])
    assert total["loss_percent"]["value"] == pytest.approx(100 * np.expm1(total["delta"]["value"]))
    steps = edge(s, "adapter", "merged")["delta"]["value"] + edge(s, "merged", "gptq")["delta"]["value"]
    assert steps == pytest.approx(total["delta"]["value"])
    assert edge(s, "base", "adapter")["delta"]["value"] == pytest.approx(-0.5, abs=0.02)
    assert s["retention"]["gptq"]["value"] == pytest.approx(0.9, abs=0.02)
    assert set(s["retention"]) == {"merged", "rtn", "gptq"}
    assert built()["sets"][0]["retention"] == {}


def test_kl_belongs_to_the_reference_only() -> None:
    s = built()["sets"][0]
    assert s["reference"] == "adapter"
    assert edge(s, "adapter", "gptq")["kl"]["mean"]["value"] > 0
    assert edge(s, "merged", "gptq")["kl"] is None
    assert edge(s, "merged", "gptq")["agreement"] is None
    assert {row[0] for row in divergence_table(s).rows} == {"merged", "gptq", "rtn"}


def test_documents_let_a_later_comparison_pair_without_a_gpu() -> None:
    s = json.loads(dumps(built()))["sets"][0]
    kept = {name: np.array(d["nll"]) for name, d in s["documents"].items()}
    n = np.array(s["documents"]["gptq"]["n"])
    assert n.tolist() == [40] * 30
    delta = (kept["gptq"] - kept["adapter"]).sum() / n.sum()
    assert delta == pytest.approx(edge(s, "adapter", "gptq")["delta"]["value"])


def test_json_holds_no_nan_and_keeps_the_facts() -> None:
    facts = FACTS | {"merge": {"error": float("nan"), "worst": np.inf, "path": Path("x"), "kinds": {"b", "a"}}}
    one = result("in-domain", ("base", "adapter", "gptq"), documents=3)
    one.scores["base"].nll[:] = one.scores["adapter"].nll  # type: ignore[index]
    report = build(sets=[one], facts=facts)
    back = json.loads(dumps(report))
    assert back == report
    assert back["facts"]["merge"] == {"error": None, "worst": None, "path": "x", "kinds": ["a", "b"]}
    assert back["facts"]["quantize"]["bits_per_weight"] == 4.25
    assert back["sets"][0]["edges"][0]["design_effect"] is None, "two models that are the same"
    assert back["sets"][0]["retention"] == {"gptq": None}
    assert "retention is not defined" in back["headline"]
    assert "n/a" not in back["headline"]
    with pytest.raises(ValueError, match="Out of range"):
        dumps({"x": float("nan")})


def test_every_rendering_prints_the_same_numbers() -> None:
    report = built()
    text = markdown.render(report)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(terminal.table(report))
    seen = console.export_text()
    card = model_card.model_card(report)
    for s in report["sets"]:
        for v in s["variants"]:
            number = format_estimate(v["ppl"])
            assert number in text
            assert number in seen
            assert number in card
        for e in s["edges"]:
            number = format_estimate(e["loss_percent"], signed=True, unit=" %")
            assert number in text
            assert number in seen
    assert report["headline"] in card


def test_every_rendering_prints_the_same_gates_and_recommendation() -> None:
    report = built()
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(terminal.table(report))
    seen = console.export_text()
    texts = {"markdown": markdown.render(report), "terminal": seen, "summary": ci.summary(report)}
    assert len(report["gates"]) == 3
    for g in report["gates"]:
        number = format_estimate(g["estimate"], unit=f" {g['unit']}")
        assert [name for name, text in texts.items() if number not in text] == []
    for o in report["recommendation"]["options"]:
        for loss in o["loss"].values():
            number = "0 % (the reference)" if loss["se"] == 0 else format_estimate(loss, signed=True, unit=" %")
            assert [name for name, text in texts.items() if number not in text] == []
    for line in (report["verdict"]["line"], report["recommendation"]["text"]):
        assert [name for name, text in texts.items() if line not in " ".join(text.split())] == []
    assert report["verdict"]["line"] in model_card.model_card(report)
    bare = built(gates=())
    assert bare["verdict"]["line"] not in model_card.model_card(bare), "a card needs no missing verdict"


def test_the_fork_onto_the_original_base_is_in_the_waterfall() -> None:
    base = result("wiki", ("base", "adapter", "merged", "gptq"))
    more = replace(base, scores=dict(base.scores) | {"original": scores(0.07, reference=True)})
    report = build(sets=[more], facts={})
    fork = edge(report["sets"][0], "adapter", "original")
    assert fork["kind"] == "fork"
    assert fork["delta"]["value"] == pytest.approx(0.07, abs=0.01)
    assert fork["kl"] is not None
    assert re.search(r"\| adapter -> original \|.*\| merged onto the original base \|", markdown.render(report))


def test_terminal_cuts_nothing_at_80_columns() -> None:
    report = built()
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal.table(report))
    seen = console.export_text()
    assert "…" not in seen
    for s in report["sets"]:
        for e in s["edges"]:
            assert format_estimate(e["loss_percent"], signed=True, unit=" %") in seen


def test_markdown_opens_with_the_answer_and_is_well_formed() -> None:
    report = built()
    text = markdown.render(report)
    assert text.splitlines()[0] == report["verdict"]["line"]
    assert text.splitlines()[2] == report["headline"]
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.strip().splitlines()}
        assert len(widths) == 1, block
    for words in (
        "What this cannot tell you",
        "quantize: {bits: 4}",
        "damp was raised",
        "1 min 23 s",
        "ledger.merged",
    ):
        assert words in text


def test_the_ten_worst_modules_come_worst_first() -> None:
    rows = modules_table(FACTS).rows
    assert [row[0] for row in rows] == [f"layers.{i}.down_proj" for i in range(14, 4, -1)]


def test_missing_facts_are_left_out() -> None:
    report = build(sets=[result("wiki", ("adapter", "gptq"))], facts={})
    assert report["headline"].startswith("GPTQ: wiki perplexity +")
    text = markdown.render(report) + model_card.model_card(report)
    assert "None" not in text
    assert "## Cost" not in text
    alone = build(sets=[result("wiki", ("gptq",))], facts={})
    assert alone["headline"] == "GPTQ was scored alone: there is no loss to report."
    assert build(sets=[result("wiki", ("base",))], facts={})["headline"].startswith("No merged")


def test_merged_is_the_reference_without_an_adapter_run() -> None:
    report = build(sets=[result("wiki", ("merged", "rtn", "gptq"))], facts=FACTS)
    assert [(e["from"], e["to"]) for e in report["sets"][0]["edges"]] == [
        ("merged", "gptq"),
        ("merged", "rtn"),
    ]
    assert "against the merged model" in report["headline"]


def test_unknown_variants_are_compared_with_the_reference() -> None:
    base = result("wiki", ("adapter", "gptq"))
    more = replace(base, scores=dict(base.scores) | {"awq": scores(0.2, reference=True)})
    report = build(sets=[more], facts={})
    assert edge(report["sets"][0], "adapter", "awq")["kind"] == "total"


def test_warnings_name_few_documents_and_a_twice_measured_model_and_repeat_nothing() -> None:
    few = result("in-domain", documents=5)
    few.scores["merged"].nll[:] = few.scores["adapter"].nll  # type: ignore[index]
    few.scores["merged"].kl[:] = 0  # type: ignore[index]
    warnings = "\n".join(build(sets=[few], facts=FACTS)["warnings"])
    assert "only 5 documents" in warnings
    assert "13-" not in warnings, "the run's own warning says it, once"
    assert "'merged' scores exactly like 'adapter'" in warnings
    assert "in-domain: 0" not in warnings


def test_other_tokens_are_never_compared() -> None:
    base = result("wiki", ("adapter", "gptq"))
    mixed = replace(base, scores=dict(base.scores) | {"rtn": scores(0.1, digest="e" * 64)})
    with pytest.raises(EvaluationError, match="'rtn' was scored on eeeeeeeeeeee"):
        build(sets=[mixed], facts={})
    with pytest.raises(EvaluationError, match="nothing to report"):
        build(sets=[], facts={})


@pytest.mark.parametrize("documents", [1, 2])
def test_an_interval_needs_three_documents(documents: int) -> None:
    with pytest.raises(EvaluationError, match=f"set 'wiki' has {documents} documents: an interval needs at least 3"):
        build(sets=[result("wiki", ("adapter", "gptq"), documents=documents)], facts={})


def test_fingerprint_follows_protocol_and_tokens() -> None:
    base = result("a")
    assert set_metrics.fingerprint(base) == set_metrics.fingerprint(replace(base, name="b"))
    changed = [{"window": 512}, {"bos": False}, {"digest": "e" * 64}, {"protocol": "gptq-2048"}]
    assert len({set_metrics.fingerprint(replace(base, **c)) for c in [{}, *changed]}) == 5  # type: ignore[arg-type]


def test_model_card_is_one_the_hub_accepts() -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(model_card.model_card(built())).data
    assert data.base_model == "org/pico-nf4"
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["gptq", "requant"]
    assert data.model_name == "pico|w4g64"
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in data.eval_results}
    expected = {}
    for s in built()["sets"]:
        ppl, loss = s["variants"][-1]["ppl"], edge(s, "adapter", "gptq")["loss_percent"]
        expected[s["name"], "perplexity"] = float(format_value(ppl["value"], ppl["se"]))
        expected[s["name"], "perplexity_increase"] = float(format_value(loss["value"], loss["se"]))
    kept = built()["sets"][1]["retention"]["gptq"]
    expected["in-domain", "retention"] = float(format_value(100 * kept["value"], 100 * kept["se"]))
    assert found == expected, "the digits of the report"
    local = ModelCard(model_card.model_card(built(FACTS | {"base": "./base-nf4"}))).data
    assert local.get("base_model") is None


def test_document_sums_stand_on_one_line_each() -> None:
    report = built(FACTS | {"odd": ["[\n1, 2\n]", [], [1], [-1.5e-7, 2], [None, 1], [[1, 2], [3]]]})
    text = dumps(report)
    assert json.loads(text) == report
    sums = [line for line in text.splitlines() if '"nll": [' in line]
    assert len(sums) == 2 * len(SHIFT)
    assert all(line.rstrip(",").endswith("]") for line in sums)


def test_a_text_that_cannot_be_written_leaves_the_old_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "report.md"
    save_text(file, "old")
    with pytest.raises(UnicodeEncodeError):
        save_text(file, "half \ud800")
    assert [f.name for f in tmp_path.iterdir()] == ["report.md"]
    assert file.read_text() == "old"


def test_save_writes_what_dumps_says(tmp_path: Path) -> None:
    report = built()
    save(report, tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("value", "se", "signed", "text"),
    [
        (25.41234, 0.123, False, "25.41"),
        (25.41234, 0.0996, False, "25.41"),
        (3.4, 12.0, True, "+3"),
        (1234.5, 345.0, False, "1234"),
        (-0.00001, 0.1, True, "0.00"),
        (0.00123456, 0.0000123, True, "+0.001235"),
        (3.14159, None, False, "3.142"),
        (0.0, 0.0, True, "0"),
        (None, 1.0, False, "n/a"),
        (float("inf"), 1.0, False, "n/a"),
    ],
)
def test_digits_follow_the_standard_error(value: float, se: float, signed: bool, text: str) -> None:
    assert format_value(value, se, signed=signed) == text


def test_estimates_bytes_and_seconds_as_text() -> None:
    estimate = {"value": 0.931, "se": 0.012, "low": 0.9, "high": 0.95}
    assert format_estimate(estimate, factor=100, unit=" %") == "93.1 % [90.0, 95.0]"
    assert format_estimate(estimate, interval=False) == "0.931"
    assert format_estimate(None) == "not defined"
    assert format_estimate({"value": 1.5, "se": None, "low": None, "high": None}) == "1.5"
    assert [format_bytes(n) for n in (5, 1500, 123456789, 4.12e9)] == ["5 B", "1.50 kB", "123 MB", "4.12 GB"]
    assert [format_seconds(s) for s in (4.2, 83, 3725)] == ["4.2 s", "1 min 23 s", "1 h 2 min"]


def test_rendering_needs_no_torch() -> None:
    code = (
        "import sys; from requant_eval import report; from requant_eval.metrics import statistics;\n"
        "from requant_eval.render import html, markdown, terminal;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": "eval"}, cwd=root, check=False)
    assert done.returncode == 0


def test_variants_table_names_its_protocol() -> None:
    s = built()["sets"][0]
    assert s["fingerprint"] in variants_table(s).note
