"""Perplexity of two other merges: into the 16-bit original, and PEFT's into 4-bit layers.

    python bench/why.py RECIPE --original BASE16 [--out FILE]

Perplexity of each on the recipe's evaluation sets, fp32, with the NF4 base and base + adapter beside them.
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

from requant import recipe
from requant.adapters import peft_directory
from requant.evaluate import variants
from requant.run import prepare, recipe_texts
from requant_eval.scoring.score_loop import score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    wanted = recipe.load(args.recipe, args.set)
    base = prepare.fetch(wanted.base.source, wanted.directory, trust_remote_code=False)
    if wanted.adapter is None:
        raise SystemExit(f"{args.recipe}: this bench wants one adapter")
    folder = prepare.fetch(wanted.adapter, wanted.directory, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(str(base))
    sets = [recipe_texts.evaluation_set(wanted, s.name, tokenizer) for s in wanted.evaluate.sets]
    plan, _ = prepare.plan_merge(args.original, peft_directory.load(folder), None, trust_remote_code=False)
    sources = variants.VariantSources(base=base, adapter=folder, merged=args.original, gptq=base, original=plan)
    rows: dict[str, Any] = {}
    for road in ("base", "adapter", "merged into the 16-bit original", "merge_and_unload on the 4-bit layers"):
        name = road if road in ("base", "adapter") else "original" if "original" in road else "adapter"
        model = variants.load(name, sources, device=torch.device("cpu"), dtype=torch.float32)
        if "unload" in road:
            model = model.merge_and_unload()
        rows[road] = {
            s.name: math.exp(float(score(model, s, batch=4, device=torch.device("cpu")).nll.mean())) for s in sets
        }
        print(f"{road:40} " + "  ".join(f"{k} {v:.2f}" for k, v in rows[road].items()), flush=True)
    packages = {p: version(p) for p in ("torch", "transformers", "peft", "bitsandbytes")}
    result = {"date": time.strftime("%Y-%m-%d"), "versions": packages, "overrides": args.set, "perplexity": rows}
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
