"""`README.md` of the checkpoint: a Hugging Face model card with the quality table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from requant_eval.headline import final_variant, method
from requant_eval.tables import facts_table, retention_table, variants_table, waterfall_table

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

SERVE = """\
vLLM:

    vllm serve PATH

SGLang:

    python -m sglang.launch_server --model-path PATH

transformers (`pip install gptqmodel optimum`):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

`PATH` is this directory or its id on a hub."""


def model_card(report: Mapping[str, Any]) -> str:
    """Front matter (base model, tags, model-index), the headline, what it costs, how to serve, where it comes
    from.
    """
    facts = report["facts"]
    name = str(report["name"] or "gptq-checkpoint")
    parts = [
        _front_matter(report, name),
        f"# {name}",
        report["headline"],
        "## Quality",
        *(
            t.markdown()
            for s in report["sets"]
            for t in (variants_table(s), waterfall_table(s), retention_table(s))
            if t.rows
        ),
        "## Serve",
        SERVE,
        "## Provenance",
        f"QLoRA base and adapter, dequantized and merged, then {_verb(report)}; scored by requant on "
        "the tokens named by the fingerprints above.",
    ]
    inputs = {key: facts.get(key) for key in ("base", "adapter", "created")}
    settings = (facts.get("quantize") or {}).get("settings")
    for t in (
        facts_table("Inputs", inputs),
        facts_table("Quantization", settings),
        facts_table("Versions", facts.get("versions")),
    ):
        if t.rows:
            parts.append(t.markdown())
    return "\n\n".join(parts) + "\n"


def _verb(report: Mapping[str, Any]) -> str:
    final = final_variant(report)
    return "quantized" if final in (None, "merged") else f"quantized ({method(report, str(final))})"


def _front_matter(report: Mapping[str, Any], name: str) -> str:
    """YAML; strings are written as JSON strings, which are YAML."""
    lines = ["---"]
    base = _hub_id(report["facts"].get("base"))
    if base:
        lines += [f"base_model: {_quoted(base)}", "base_model_relation: quantized"]
    lines += ["library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gptq", "- requant"]
    results = _results(report)
    if results:
        lines += ["model-index:", f"- name: {_quoted(name)}", "  results:", *results]
    return "\n".join([*lines, "---"])


def _results(report: Mapping[str, Any]) -> list[str]:
    final = final_variant(report)
    lines = []
    for s in report["sets"]:
        for v in s["variants"]:
            if v["name"] != final or v["ppl"]["value"] is None:
                continue
            metric = f"perplexity ({s['protocol']}, window {s['window']}, fingerprint {s['fingerprint']})"
            lines += [
                "  - task: {type: text-generation, name: Text Generation}",
                f"    dataset: {{type: {_quoted(s['name'])}, name: {_quoted(s['name'])}}}",
                "    metrics:",
                f"    - {{type: perplexity, name: {_quoted(metric)}, value: {v['ppl']['value']:.6g}}}",
            ]
    return lines


def _hub_id(base: Any) -> str | None:
    name = base.get("name") if isinstance(base, Mapping) else base
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) else None


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
