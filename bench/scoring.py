"""Bench of scoring alone: variants on one set, by several checkouts of requant.

    python bench/scoring.py RECIPE --code before . [--variants merged adapter] [--documents 40] [--rounds 2]
                            [--out FILE]

Only the stage evaluate runs, each time in a process of its own: models are loaded, then scored. `cpu` is the CPU time
of the process, which other work on the machine changes least; the ratio is to the last checkout. Scores are compared
token by token. merged: the base's decoded weights and the adapter in one (written once, beside the recipe).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from whole import machine, shown

ROOT = Path(__file__).resolve().parents[1]


def child(args: argparse.Namespace) -> None:
    """Score in this process; the checkout is the one on PYTHONPATH."""
    import torch

    from requant import merge, recipe
    from requant.evaluate import stage
    from requant.evaluate.scores import Scores
    from requant.run import evaluation_inputs, prepare
    from requant.runtime.device import pick_device

    p = prepare.prepare(recipe.load(args.recipe))
    device, folder = pick_device("auto"), args.recipe.parent / "scoring"
    if not (folder / "merged" / "config.json").exists():
        (folder / "merged").mkdir(parents=True, exist_ok=True)
        merge.merge(p.merge.plan, folder / "merged", dtype="float16")
    chosen = p.texts.sets[0]
    windows = chosen.windows[: args.documents]
    some = replace(chosen, windows=windows, n_scored=sum(int(w.scored.sum()) for w in windows))
    keys = {name: name for name in args.variants}
    dtype = evaluation_inputs.dtype(p, device)
    scores = Scores(cache=args.cache, sets=(some,), keys=keys, device=device, dtype=dtype, kl="adapter" in keys)
    sources = evaluation_inputs.variant_sources(p, folder)
    began = {"seconds": time.perf_counter(), "cpu": time.process_time()}
    stage.evaluate(scores, sources, batch=evaluation_inputs.batch(p, device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    used = {"seconds": time.perf_counter() - began["seconds"], "cpu": time.process_time() - began["cpu"]}
    found = scores.load()[some.name]
    torch.save({n: {k: getattr(s, k) for k in ("nll", "kl", "top1")} for n, s in found.items()}, args.cache / "found")
    print("RESULT " + json.dumps(used | {"scoring": {n: s.seconds for n, s in found.items()}, "tokens": some.n_scored}))


def measured(code: Path, argv: list[str], cache: Path) -> dict[str, Any]:
    known = os.environ | {"PYTHONPATH": os.pathsep.join(str(code.resolve() / p) for p in ("pipeline", "eval"))}
    command = [sys.executable, __file__, *argv, "--cache", str(cache)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=known)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(lines[-1].removeprefix("RESULT "))  # type: ignore[no-any-return]


def differences(one: Path, other: Path) -> dict[str, float]:
    """Largest differences of tokens, and of means relative to the mean, over variants."""
    import torch

    a, b = (torch.load(folder / "found", weights_only=False) for folder in (one, other))
    out: dict[str, float] = {}
    for name in b:
        for kind in ("nll", "kl"):
            x, y = a[name][kind], b[name][kind]
            if y is not None:
                found = {
                    f"{kind}, token": float(abs(x - y).max()),
                    f"{kind}, mean, relative": abs(x.mean() / y.mean() - 1),
                }
                out |= {k: max(out.get(k, 0.0), v) for k, v in found.items()}
        out["top1, tokens"] = out.get("top1, tokens", 0) + int((a[name]["top1"] != b[name]["top1"]).sum())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--code", type=Path, nargs="+", default=[ROOT])
    parser.add_argument("--variants", nargs="+", default=["adapter", "merged"])
    parser.add_argument("--documents", type=int, default=10**9)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cache", type=Path)
    args = parser.parse_args()
    if args.cache:
        child(args)
        return
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "arguments": shown(sys.argv[1:]), **machine(), "rounds": [],
    }  # fmt: skip
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as temporary:
            folders = [Path(temporary) / str(n) for n in range(len(args.code))]
            for folder in folders:
                folder.mkdir()
            runs = [measured(code, sys.argv[1:], folder) for code, folder in zip(args.code, folders, strict=True)]
            ratios = [{k: run[k] / runs[-1][k] for k in ("seconds", "cpu")} for run in runs[:-1]]
            apart = [differences(folder, folders[-1]) for folder in folders[:-1]]
        result["rounds"].append({"runs": runs, "times the last one's": ratios, "differences": apart})
        print(json.dumps(result["rounds"][-1], indent=1), flush=True)
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
