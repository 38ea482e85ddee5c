"""`README.md` of the checkpoint: a Hugging Face model card with the quality table."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from requant_eval.escaping import markdown, markdown_block, yaml
from requant_eval.metrics.engine_step import proofs
from requant_eval.metrics.facts import Facts, is_16_bit_base, known_facts
from requant_eval.metrics.lookup import step_from_reference
from requant_eval.metrics.records import Estimate, EvaluationSet, scaled
from requant_eval.metrics.task_metrics import without_variant
from requant_eval.render.document import readable
from requant_eval.render.engine_table import checks_table
from requant_eval.render.format_table import formats_table
from requant_eval.render.input_tables import inputs_table
from requant_eval.render.road_tables import card_table
from requant_eval.render.set_tables import protocol, retention_table, variants_table, waterfall_table
from requant_eval.render.tables import facts_table
from requant_eval.render.task_tables import task_tables
from requant_eval.report.adapter_gain import BEWARE
from requant_eval.report.headline import final_variant, headline, method, reference_name
from requant_eval.report.number_format import format_value
from requant_eval.report.records import Report

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

SERVE = """\
vLLM:

    vllm serve PATH

SGLang:

    python -m sglang.launch_server --model-path PATH

transformers (`pip install PACKAGES`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

`PATH` is this directory or its id on a hub."""


GGUF = "gguf"
SERVE_GGUF = """\
llama.cpp:

    llama-server -m PATH

`PATH` is the .gguf file in this directory."""
MLX = "mlx"
SERVE_MLX = """\
MLX (`pip install mlx-lm`):

    mlx_lm.generate --model PATH --prompt TEXT

`PATH` is this directory or its id on a hub."""
SAME_CODES = (
    "The files are in the format {0}. Their codes, scales and zero points are those of the GPTQ checkpoint that was "
    "scored; the conversion was read back and compared with it: {1}."
)
PACKAGES = {"gptq": "gptqmodel optimum", "compressed-tensors": "compressed-tensors", "auto-round": "auto-round"}
"""Format of a checkpoint -> what transformers needs to load it."""


def model_card(report: Report, without: Collection[str] = (), *, layout: str = "gptq") -> str:
    """The card as Markdown: front matter, headline, quality, how to serve, provenance.

    without: variants to leave out, because the checkpoint neither is one nor was made of it. layout: its format; one
    that is not GPTQ holds the same codes.
    """
    report = readable(_without(report, without) if without else report)
    facts = known_facts(report["facts"])
    name = str(report["name"] or "gptq-checkpoint")
    parts = [
        _front_matter(report, name, layout),
        f"# {markdown(name)}",
        *(
            [markdown_block(report["verdict"]["line"])]
            if report["gates"] or BEWARE in report["verdict"]["line"]
            else []
        ),
        markdown_block(report["headline"]),
        "## Quality",
        *(
            t.markdown()
            for s in report["sets"]
            for t in (variants_table(s), waterfall_table(s), retention_table(s))
            if t.rows
        ),
        *(t.markdown() for t in task_tables(report)[:1]),
        *(t.markdown() for t in (card_table(report, final_variant(report)),) if t.rows),
        "## Serve",
        *([_same_codes(facts, layout)] if layout != "gptq" else []),
        _serve(layout),
        "## Provenance",
        markdown_block(
            f"{_merged_from(facts)}, then {_verb(report)}; scored by requant on the tokens named by the fingerprints "
            "above."
        ),
    ]
    settings = (facts.get("quantize") or {}).get("settings")
    for t in (
        *(checks_table(name, proof) for name, proof in proofs(facts) if name not in without),
        formats_table(facts),
        inputs_table(facts, created=True),
        facts_table("Quantization", settings),
        facts_table("Versions", facts.get("versions")),
    ):
        if t.rows:
            parts.append(t.markdown())
    return "\n\n".join(parts) + "\n"


def _serve(layout: str) -> str:
    """How to serve a checkpoint of this format."""
    own = {GGUF: SERVE_GGUF, MLX: SERVE_MLX}
    return own[layout] if layout in own else SERVE.replace("PACKAGES", PACKAGES[layout])


def _same_codes(facts: Facts, layout: str) -> str:
    """How the files of a format agree with those that were scored."""
    found = (facts.get("formats") or {}).get(layout) or {}
    rounding, ends = found.get("largest_rounding"), found.get("ends") or {}
    how = f"weights are at most {rounding:.2g} steps of their scales off" if rounding else "all weights are equal"
    told = [f"{name} is rounded to {bits} bits, each value to its nearest" for name, bits in ends.items()]
    return SAME_CODES.format(layout, "; but ".join([how, *([" and ".join(told)] if told else [])]))


def _without(report: Report, without: Collection[str]) -> Report:
    """The report without some variants."""
    sets: list[EvaluationSet] = [
        {
            **s,
            "variants": [v for v in s["variants"] if v["name"] not in without],
            "edges": [e for e in s["edges"] if not {e["from"], e["to"]} & set(without)],
            "kernels": [e for e in s.get("kernels") or [] if e["from"] not in without],
            "retention": {name: value for name, value in s["retention"].items() if name not in without},
        }
        for s in report["sets"]
    ]
    kept: Report = {**report, "sets": sets, "gates": []}  # the gates judged what ships
    if "tasks" in report:
        for variant in without:
            kept["tasks"] = [without_variant(task, variant) for task in kept["tasks"]]
    if "roads" in report:
        kept["roads"] = [road for road in report["roads"] if road["name"] not in without]
    return {**kept, "headline": headline(kept)}


def _merged_from(facts: Facts) -> str:
    if is_16_bit_base(facts):
        return "16-bit base and adapter, merged"
    return "QLoRA base and adapter, dequantized and merged"


def _verb(report: Report) -> str:
    final = final_variant(report)
    return "quantized" if final in (None, "merged") else f"quantized ({method(report, str(final))})"


def _front_matter(report: Report, name: str, layout: str) -> str:
    """What a hub reads off the card, as YAML."""
    base = _hub_id(known_facts(report["facts"]).get("base"))
    data: dict[str, Any] = {"base_model": base, "base_model_relation": "quantized"} if base else {}
    data |= {} if layout == GGUF else {"library_name": "transformers"}
    data |= {"pipeline_tag": "text-generation", "tags": [layout, "requant"]}
    results = _results(report)
    if results:
        data["model-index"] = [{"name": name, "results": results}]
    return f"---\n{yaml(data)}---"


def _results(report: Report) -> list[dict[str, Any]]:
    """model-index entries of the variant that ships, one a set, with the report's digits."""
    final, found = final_variant(report), []
    for s in report["sets"]:
        metrics = [
            {"type": kind, "name": name, "value": float(value)} for kind, name, value in _metrics(report, s, final)
        ]
        if metrics:
            found.append(
                {
                    "task": {"type": "text-generation", "name": "Text Generation"},
                    "dataset": {"type": s["name"], "name": s["name"]},
                    "metrics": metrics,
                }
            )
    return [*found, *_task_results(report, final)]


def _task_results(report: Report, final: str | None) -> Iterator[dict[str, Any]]:
    """model-index entries of the tasks that the variant which ships was run on."""
    for task in report.get("tasks") or []:
        score = next((v["score"] for v in task["variants"] if v["name"] == final), None)
        if score is not None and score["value"] is not None:
            shown = scaled(score, task["scale"])
            name = f"{task['metric']}, {task['few_shot']}-shot{_interval(shown)}"
            value = float(format_value(shown["value"], shown["se"]))
            yield {
                "task": {"type": "text-generation", "name": "Text Generation"},
                "dataset": {"type": task["task"], "name": task["name"]},
                "metrics": [{"type": task["metric"].partition(",")[0], "name": name, "value": value}],
            }


def _metrics(report: Report, s: EvaluationSet, final: str | None) -> Iterator[tuple[str, str, str]]:
    """(type, name, value) of one set: perplexity, its increase against the reference, retention."""
    ppl = next((v["ppl"] for v in s["variants"] if v["name"] == final), None)
    if ppl is None or ppl["value"] is None:
        return
    yield "perplexity", f"perplexity ({protocol(s)}){_interval(ppl)}", format_value(ppl["value"], ppl["se"])
    edge = step_from_reference(s, final)
    if edge is not None and edge["loss_percent"]["value"] is not None:
        loss = edge["loss_percent"]
        name = f"perplexity increase against {reference_name(report, edge['from'])}, %{_interval(loss)}"
        yield "perplexity_increase", name, format_value(loss["value"], loss["se"])
    found = s["retention"].get(final or "")
    if found is not None:
        kept = scaled(found, 100)
        name = f"of what the adapter learned, kept, %{_interval(kept)}"
        yield "retention", name, format_value(kept["value"], kept["se"])


def _interval(estimate: Estimate) -> str:
    low, high = (format_value(estimate[end], estimate["se"]) for end in ("low", "high"))
    return "" if estimate["low"] is None else f", 95 % interval {low} to {high}"


def _hub_id(base: str | Mapping[str, Any] | None) -> str | None:
    name = base.get("name") if isinstance(base, Mapping) else base
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) else None
