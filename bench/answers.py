"""Bench of greedy answers: plain, on decoded weights, and by captured steps.

    python bench/answers.py --model RECIPE_OR_RUN [--variants adapter merged gptq] [--set KEY=VALUE ...]
                            [--new-tokens N] [--repeat 1] [--out FILE]

--model: a recipe, or the directory of a run. What the run lacks is left out, but for merged, which is merged here.
--set: as of requant run, such as evaluate.answers.begin=32, by which plain texts have prompts.
plain: 4-bit weights are decoded in each step, and each kernel is launched by itself. decoded: weights are decoded once.
captured: so too, and a step is one launch; on a CPU the same steps without a graph. Seconds are of reading the prompts
and of all steps, captures included. same: answers that are those of plain, token by token.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from whole import machine, shown

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "pipeline"), str(ROOT / "eval")]

from requant import merge, recipe
from requant.data.prompts import Prompts
from requant.evaluate import variants
from requant.evaluate.trained_base import decoded_once
from requant.run import evaluation_inputs, prepare
from requant.run.runner import directory_of
from requant.runtime.cuda_graph import CudaGraph
from requant.runtime.device import free_memory, pick_device
from requant_eval.scoring.answers import answer

WAYS = ("plain", "decoded", "captured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=["adapter", "merged", "gptq"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of requant run")
    parser.add_argument("--new-tokens", type=int, help="of an answer, in place of the recipe's")
    parser.add_argument("--repeat", type=int, default=1, help="of each measurement, of which the fastest counts")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("requant_eval.scoring.answers").setLevel(logging.INFO)  # why steps are not captured
    run = args.model if args.model.is_dir() else None
    run = args.model if args.model.is_dir() else None
    prepared = prepare.prepare(recipe.load(run / "recipe.yaml" if run else args.model, args.set))
    asked = prepared.texts.prompts
    if asked is None or not asked.items:
        raise SystemExit(f"no prompts: {asked.why if asked else 'evaluate.answers.prompts is 0'}")
    asked = replace(asked, new_tokens=args.new_tokens or asked.new_tokens)
    run, device = run or directory_of(prepared.recipe).path, pick_device(prepared.recipe.device)
    result = {"date": time.strftime("%Y-%m-%d"), "arguments": shown(sys.argv[1:]), **machine()}
    result |= {"prompts": len(asked.items), "prompt_tokens": sum(len(item.ids) for item in asked.items)}
    result |= {"new_tokens": asked.new_tokens, "variants": {}}
    with tempfile.TemporaryDirectory() as folder:
        sources = evaluation_inputs.variant_sources(prepared, run)
        if "merged" in args.variants and not (run / "merged" / "config.json").exists():
            merge.merge(prepared.merge.plan, Path(folder), dtype=str(prepared.quantize.dtype).removeprefix("torch."))
            sources = replace(sources, merged=Path(folder))
        load = partial(variants.load, sources=sources, device=device, dtype=evaluation_inputs.dtype(prepared, device))
        for name in args.variants:
            if name not in ("adapter", "merged", "base") and not (run / name / "config.json").exists():
                print(f"{name}: not in {run.name}")
                continue
            result["variants"][name] = of_variant(name, load(name), asked, device, args.repeat)
            free_memory(device)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def of_variant(name: str, model: Any, asked: Prompts, device: torch.device, repeat: int) -> dict[str, dict[str, Any]]:
    """Way -> what was measured; each is printed."""
    rows: dict[str, dict[str, Any]] = {}
    expected: list[list[int]] = []
    once(model, replace(asked, new_tokens=2), device, "plain")  # libraries load
    for way in WAYS:
        tries = [once(model, asked, device, way) for _ in range(repeat)]
        row, given = min(tries, key=lambda tried: tried[0]["seconds"])
        expected = expected or given
        row["same"] = sum(a == b for a, b in zip(given, expected, strict=True))
        row["same_tokens"] = sum(map(same_beginning, given, expected))
        rows[way] = row
        of = f"{row['ms_a_step']:8.2f} ms a step {row['tokens']:6} tokens"
        same = f"same {row['same']} of {len(given)}, {row['same_tokens']} tokens{row['note']}"
        print(f"{name:8} {way:9} {row['seconds']:8.2f} s, {row['cpu_seconds']:.2f} of the CPU {of}  {same}", flush=True)
    return rows


def once(model: Any, asked: Prompts, device: torch.device, way: str) -> tuple[dict[str, Any], list[list[int]]]:
    """(what was measured, the answers) of one way."""
    captures: list[float] = []

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        begun = time.perf_counter()
        launch = CudaGraph(step, device=device) if device.type == "cuda" else step
        captures.append(time.perf_counter() - begun)
        return launch

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    begun, busy = time.perf_counter(), time.process_time()
    with nullcontext(False) if way == "plain" else decoded_once(model, device) as decoded:
        given = answer(
            model, [item.ids for item in asked.items], asked.new_tokens, stops=asked.stops, device=device,
            capture=capture if way == "captured" else None,
        )  # fmt: skip
    seconds, steps = time.perf_counter() - begun, max(map(len, given))
    row: dict[str, Any] = {"seconds": seconds, "cpu_seconds": time.process_time() - busy}
    row |= {"steps": steps, "ms_a_step": 1e3 * seconds / steps}
    row |= {"tokens": sum(map(len, given)), "decoded": decoded, "captures": captures, "note": ""}
    if device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    if way == "captured":
        row["note"] = f", captured in {sum(captures):.2f} s" if captures else ", NOT captured"
    return row, given


def same_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


if __name__ == "__main__":
    main()
