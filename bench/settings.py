"""Perplexity of each quantizer setting on the demo's merged model, one row a setting.

On the demo's two held-out sets.

    python bench/settings.py --base work/base-nf4 --adapter adapter --texts work/texts --out FILE

Merges first (the same fp16 checkpoint for all), then quantizes and scores. Meant for a GPU; runs anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "pipeline"), str(ROOT / "eval")]

from requant import merge, quantize
from requant.adapters import peft_directory
from requant.data import packing
from requant.data.documents import TextSource, tokenize
from requant.evaluate import variants
from requant.numerics.grid import Grid
from requant.quantize import memory
from requant.quantize.plan import Settings
from requant.run import prepare
from requant.runtime.device import PROFILES
from requant_eval.scoring import windows as ev
from requant_eval.scoring.score_loop import score

G = Grid(4, 64)
S = Settings
DEFAULT = S(grid=G, sweeps=2, correct=0.5)
# name: (settings, exact tokens for each input, calibration windows, their length)
SETTINGS: dict[str, tuple[Settings, int, int, int]] = {
    "warm-up": (DEFAULT, 8, 8, 512),
    "defaults": (DEFAULT, 8, 48, 512),
    "drift from 4 tokens an input": (DEFAULT, 4, 48, 512),
    "drift from 2 tokens an input": (DEFAULT, 2, 48, 512),
    "drift from all tokens": (DEFAULT, 10**6, 48, 512),
    "no sweep": (replace(DEFAULT, sweeps=0), 8, 48, 512),
    "1 sweep": (replace(DEFAULT, sweeps=1), 8, 48, 512),
    "4 sweeps": (replace(DEFAULT, sweeps=4), 8, 48, 512),
    "correct 0": (replace(DEFAULT, correct=0.0), 8, 48, 512),
    "correct 0.25": (replace(DEFAULT, correct=0.25), 8, 48, 512),
    "correct 0.75": (replace(DEFAULT, correct=0.75), 8, 48, 512),
    "correct 1": (replace(DEFAULT, correct=1.0), 8, 48, 512),
    "signed scales": (replace(DEFAULT, grid=Grid(4, 64, signed=True)), 8, 48, 512),
    "3 bits": (replace(DEFAULT, grid=Grid(3, 64)), 8, 48, 512),
    "3 bits, correct 0": (replace(DEFAULT, grid=Grid(3, 64), correct=0.0), 8, 48, 512),
    "120 x 1024": (DEFAULT, 8, 120, 1024),
    "120 x 1024, drift from 4 tokens an input": (DEFAULT, 4, 120, 1024),
    "120 x 1024, drift from all tokens": (DEFAULT, 10**6, 120, 1024),
    "120 x 1024, no sweep": (replace(DEFAULT, sweeps=0, order="activation"), 8, 120, 1024),
    "120 x 1024, no sweep, the better order": (replace(DEFAULT, sweeps=0), 8, 120, 1024),
    "120 x 1024, correct 0": (replace(DEFAULT, correct=0.0), 8, 120, 1024),
    "120 x 1024, correct 0, no sweep": (replace(DEFAULT, correct=0.0, sweeps=0), 8, 120, 1024),
    "120 x 1024, correct 0, no sweep, activation": (
        replace(DEFAULT, correct=0.0, sweeps=0, order="activation"),
        8,
        120,
        1024,
    ),
    "120 x 1024, correct 0.75": (replace(DEFAULT, correct=0.75), 8, 120, 1024),
}


def texts(folder: Path, tokenizer: Any) -> tuple[list[tuple[str, Any, float]], list[ev.EvalSet]]:
    """(calibration entries, evaluation sets) of the demo."""

    def read(name: str) -> Any:
        return tokenize(TextSource(path=folder / name), tokenizer)

    entries = [(n, read(n), 0.5) for n in ("train.jsonl", "general-calibration.jsonl")]
    sets = []
    for name, file in (("in-domain", "heldout.jsonl"), ("general", "general.jsonl")):
        documents = [ev.Document(d.ids) for d in read(file)]
        sets.append(ev.make_set(name, documents, window=512, bos_id=None))
    return entries, sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "texts", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/requant-settings"))
    parser.add_argument("--only", default="", help="rows whose names hold one of these, split by ;")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(str(args.base))
    merged = args.work / "merged"
    merged.mkdir(parents=True, exist_ok=True)
    plan, _ = prepare.plan_merge(args.base, peft_directory.load(args.adapter), None, trust_remote_code=False)
    merge.merge(plan, merged, dtype="auto")
    entries, sets = texts(args.texts, tokenizer)
    sources = variants.VariantSources.of_checkpoint(merged)
    model = variants.load("merged", sources, device=device, dtype=torch.float32)
    floor = {s.name: float(score(model, s, batch=16, device=device).nll.mean()) for s in sets}
    rows: list[dict[str, Any]] = [{"setting": "merged"} | floor]
    for name, (settings, exact, samples, length) in SETTINGS.items():
        if not any(part in name for part in args.only.split(";")):
            continue
        memory.UNQUANTIZED_TOKENS = exact
        for kind, profile in list(PROFILES.items()):
            PROFILES[kind] = replace(profile, least_unquantized_tokens=0)
        windows = packing.calibration_windows(
            entries, samples=samples, length=length, seed=0, bos=None, eos=tokenizer.eos_token_id
        )
        out = args.work / str(len(rows))
        out.mkdir(exist_ok=True)
        started = time.perf_counter()
        quantize.quantize(merged, out, windows, settings, dtype=torch.bfloat16, device=device)
        seconds = time.perf_counter() - started
        model = variants.quantized(out, device=device, dtype=torch.float32)
        loss = {s.name: float(score(model, s, batch=16, device=device).nll.mean()) - floor[s.name] for s in sets}
        rows.append({"setting": name, "seconds": round(seconds, 1)} | loss)
        print(f"{name:44} {loss['in-domain']:.4f} {loss['general']:.4f}  {seconds:.1f} s", flush=True)
        args.out.write_text(
            json.dumps({"device": str(device), "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
