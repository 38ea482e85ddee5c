"""Our GPTQ against gptqmodel in one run: same merged model, tokens, bits, group, symmetry.

    python bench/quantize.py RECIPE --merged runs/NAME/merged [--out FILE] [--peer-dtype default|float32] [--set ...]

Each side runs alone in a process of its own, from loading to the written checkpoint. Both checkpoints are then
dequantized by the same code and scored on the recipe's evaluation sets in fp32. Prints the ratio of times and of losses
in log-perplexity; absolute CPU seconds are not comparable between machines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")


def windows(recipe_path: Path, overrides: list[str]) -> tuple[Any, Any, Any]:
    """(recipe, calibration windows, evaluation sets) of a recipe."""
    from requant import recipe
    from requant.run import prepare, recipe_texts

    wanted = recipe.load(recipe_path, overrides)
    base = prepare.fetch(wanted.base.source, wanted.directory, trust_remote_code=False)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(base))
    _, calibration, _ = recipe_texts.calibration(wanted, tokenizer)
    return wanted, calibration, [recipe_texts.evaluation_set(wanted, s.name, tokenizer) for s in wanted.evaluate.sets]


def ours(args: argparse.Namespace) -> None:
    """Quantize with requant; prints one JSON line."""
    import torch

    from requant import quantize
    from requant.run import quantize_inputs

    wanted, calibration, _ = windows(args.recipe, args.set)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    args.work.mkdir(parents=True)
    quantize.quantize(
        args.merged, args.work, calibration, quantize_inputs.quantize_settings(wanted), dtype=torch.bfloat16, device=device,
        batch=max(1, 2048 // calibration.shape[1]),
    )  # fmt: skip
    finish(started, device)


def gptqmodel(args: argparse.Namespace) -> None:
    """Quantize with gptqmodel; print one JSON line.

    Its defaults for everything that the recipe does not say.
    """
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    wanted, calibration, _ = windows(args.recipe, args.set)
    q = wanted.quantize
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    config = QuantizeConfig(bits=q.bits, group_size=q.group_size, sym=q.symmetric, desc_act=False, device=device)
    dtype = {} if args.peer_dtype == "default" else {"dtype": getattr(torch, args.peer_dtype)}
    model = GPTQModel.load(str(args.merged), config, **dtype)
    rows = [{"input_ids": w[None], "attention_mask": torch.ones_like(w[None])} for w in calibration]
    model.quantize(rows, batch_size=max(1, 2048 // calibration.shape[1]))
    model.save(str(args.work))
    finish(started, torch.device(device))


def finish(started: float, device: Any) -> None:
    import torch

    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT " + json.dumps({"seconds": seconds, "peak_rss": rss, "peak_device": peak}))


def score(args: argparse.Namespace) -> None:
    """Mean NLL of a checkpoint (dequantized by us) on the evaluation sets; prints one JSON line."""
    import torch

    from requant.evaluate import variants
    from requant_eval.scoring.score_loop import score as score_set

    _, _, sets = windows(args.recipe, args.set)
    sources = variants.VariantSources.of_checkpoint(args.merged)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.work == args.merged:
        model = variants.load("merged", sources, device=device, dtype=torch.float32)
    else:
        model = variants.quantized(args.work, device=device, dtype=torch.float32)
    nll = {s.name: float(score_set(model, s, batch=4, device=device).nll.mean()) for s in sets}
    print("RESULT " + json.dumps(nll))


def child(role: str, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run one role in a process of its own and read its result line."""
    command = [
        sys.executable,
        __file__,
        str(args.recipe),
        "--merged",
        str(args.merged),
        "--role",
        role,
        "--work",
        str(work),
    ]
    command += ["--peer-dtype", args.peer_dtype, *(x for s in args.set for x in ("--set", s))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{role} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))  # type: ignore[no-any-return]


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Both sides, then their losses against the merged model."""
    roles = [r for r in ("ours", "gptqmodel") if args.only in (None, r)]
    with tempfile.TemporaryDirectory() as folder:
        runs = {r: child(r, Path(folder) / r, args) for r in roles}
        reference = child("score", args.merged, args)
        for r in roles:
            nll = child("score", Path(folder) / r, args)
            runs[r]["log_ppl_loss"] = {name: nll[name] - reference[name] for name in reference}
    result: dict[str, Any] = {"merged_nll": reference, "runs": runs}
    if len(roles) == 2:
        a, b = runs["ours"], runs["gptqmodel"]
        result["time_ratio"] = a["seconds"] / b["seconds"]
        result["loss_ratio"] = {n: a["log_ppl_loss"][n] / b["log_ppl_loss"][n] for n in reference}
        result["rss_ratio"] = a["peak_rss"] / b["peak_rss"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--merged", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--only", choices=("ours", "gptqmodel"))
    parser.add_argument("--peer-dtype", default="default")
    parser.add_argument("--role", choices=("ours", "gptqmodel", "score"))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.role:
        {"ours": ours, "gptqmodel": gptqmodel, "score": score}[args.role](args)
        return
    packages = ("torch", "transformers", *(["gptqmodel"] if args.only != "ours" else []))
    result = compare(args) | {
        "date": time.strftime("%Y-%m-%d"), "overrides": args.set, "peer_dtype": args.peer_dtype,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": {p: version(p) for p in packages},
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
