"""The demo's adapter by every road people take: perplexity on the recipe's sets, in fp32.

    python bench/why.py recipes/smollm2-pydocs/recipe.yaml --run runs/smollm2-pydocs-w4g64 \
        --original recipes/smollm2-pydocs/work/base-16bit [--out FILE]

base, adapter, merged, rtn and gptq come from the run's saved scores. Two roads more are scored here: merged into the
original 16-bit base, and PEFT's merge_and_unload on the 4-bit layers.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from requant import adapter, prepare, recipe, texts, variants
from requant_eval.score import score


def in_place(places: variants.Places) -> Any:
    """PEFT's merge into the bitsandbytes layers: dequantize, add, quantize again."""
    model = variants.load("adapter", places, device=torch.device("cpu"), dtype=torch.float32)
    return model.merge_and_unload()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    wanted = recipe.load(args.recipe)
    base = prepare.fetch(wanted.base.source, wanted.directory, False)
    adapted = prepare.fetch(wanted.adapter, wanted.directory, False)
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    sets = [texts.evaluation_set(wanted, s.name, tokenizer) for s in wanted.evaluate.sets]
    plan, _ = prepare.plan_merge(args.original, adapter.load(adapted), None, False)
    places = variants.Places(base, adapted, args.run / "merged", args.run / "gptq", None, {}, plan)
    report = json.loads((args.run / "report.json").read_text())
    rows: dict[str, dict[str, float]] = {}
    for found in report["sets"]:
        for v in found["variants"]:
            rows.setdefault(v["name"], {})[found["name"]] = v["ppl"]["value"]
    device = torch.device("cpu")
    roads = {
        "merged into the original 16-bit base": lambda: variants.load(
            "original", places, device=device, dtype=torch.float32
        ),
        "PEFT merge_and_unload on the 4-bit layers": lambda: in_place(places),
    }
    for name, load in roads.items():
        model = load()
        rows[name] = {s.name: math.exp(float(score(model, s, batch=4, device=device).nll.mean())) for s in sets}
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    result = {"date": time.strftime("%Y-%m-%d"), "perplexity": rows, "versions": {p: version(p) for p in packages}}
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
