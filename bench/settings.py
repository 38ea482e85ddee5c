"""What each quantizer setting gives on the demo's merged model: perplexity on its two held-out sets, one row a setting.

    python bench/settings.py --base work/base-nf4 --adapter adapter --texts work/texts --out FILE

Merges first (the same fp16 checkpoint for all), then quantizes and scores. Meant for a GPU; runs anywhere.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "pipeline"), str(ROOT / "eval")]

from requant import adapter, data, layout, merge, prepare, quantize, variants
from requant.grid import Grid
from requant_eval import windows as ev
from requant_eval.score import score

G = Grid
# name: (grid, order, damp, calibration windows, sweeps of coordinate descent)
SETTINGS: dict[str, tuple[Grid, str, float | None, int, int]] = {
    "activation": (G(4, 64), "activation", None, 48, 0),
    "activation, 1 sweep": (G(4, 64), "activation", None, 48, 1),
    "activation, 3 sweeps": (G(4, 64), "activation", None, 48, 3),
    "activation, 6 sweeps": (G(4, 64), "activation", None, 48, 6),
    "auto, 3 sweeps": (G(4, 64), "auto", None, 48, 3),
    "activation, 3 sweeps, damp .02": (G(4, 64), "activation", 0.02, 48, 3),
    "activation, 3 sweeps, damp .05": (G(4, 64), "activation", 0.05, 48, 3),
    "natural, 3 sweeps": (G(4, 64), "natural", None, 48, 3),
    "signed, activation, 3 sweeps": (G(4, 64, signed=True), "activation", None, 48, 3),
    "activation, 12 sweeps": (G(4, 64), "activation", None, 48, 12),
    "minmax, group, damp .05": (G(4, 64, search="minmax"), "group", 0.05, 48, 0),
    "minmax, activation, 3 sweeps": (G(4, 64, search="minmax"), "activation", None, 48, 3),
    "asymmetric, activation, 3 sweeps": (G(4, 64, symmetric=False), "activation", None, 48, 3),
    "3 bits, activation, 3 sweeps": (G(3, 64), "activation", None, 48, 3),
    "8 bits, activation, 3 sweeps": (G(8, 64), "activation", None, 48, 3),
}


def texts(folder: Path, tokenizer: Any) -> tuple[list[tuple[str, Any, float]], list[ev.EvalSet]]:
    """(calibration entries, evaluation sets) of the demo."""

    def read(name: str) -> Any:
        return data.tokenize(data.Source(path=folder / name), tokenizer)

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
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(str(args.base))
    merged = args.work / "merged"
    merged.mkdir(parents=True, exist_ok=True)
    plan, _ = prepare.plan_merge(args.base, adapter.load(args.adapter), None, False)
    merge.merge(plan, merged, dtype="auto")
    entries, sets = texts(args.texts, tokenizer)
    places = variants.Places(args.base, args.adapter, merged, merged, None, {})
    model = variants.load("merged", places, device=device, dtype=torch.float32)
    floor = {s.name: float(score(model, s, batch=16, device=device).nll.mean()) for s in sets}
    rows: list[dict[str, Any]] = [{"setting": "merged"} | floor]
    for name, (grid, order, damp, samples, sweeps) in SETTINGS.items():
        if args.only not in name:
            continue
        windows = data.calibration_windows(
            entries, samples=samples, length=512, seed=0, bos=None, eos=tokenizer.eos_token_id
        )
        out = args.work / str(len(rows))
        out.mkdir(exist_ok=True)
        started = time.perf_counter()
        settings = layout.Settings(grid, order, sweeps, damp)  # type: ignore[arg-type]
        quantize.quantize(merged, out, windows, settings, dtype=torch.bfloat16, device=device, batch=4)
        seconds = time.perf_counter() - started
        model = variants.quantized(out, places, device, torch.float32)
        loss = {s.name: float(score(model, s, batch=16, device=device).nll.mean()) - floor[s.name] for s in sets}
        rows.append({"setting": name, "seconds": round(seconds, 1)} | loss)
        print(f"{name:28} {loss['in-domain']:.4f} {loss['general']:.4f}  {seconds:.1f} s", flush=True)
        args.out.write_text(
            json.dumps({"device": str(device), "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
