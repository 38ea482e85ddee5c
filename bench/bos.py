"""Loss of a checkpoint whose calibration windows begin with BOS, or anywhere in the text.

Both are calibrated on the same text: a window that begins with BOS gives its last token for it.

    python bench/bos.py --model DIR --texts work/texts --out FILE [--bits 4 3] [--seeds 0 1]

`--model` is a 16-bit model whose tokenizer adds BOS; scored windows begin with it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "pipeline"), str(ROOT / "eval")]

from requant import quantize
from requant.data import packing
from requant.data.documents import TextSource, tokenize
from requant.evaluate import variants
from requant.numerics.grid import Grid
from requant.quantize.plan import Settings
from requant_eval.scoring import windows as ev
from requant_eval.scoring.score_loop import score

SETS = (("in-domain", "heldout.jsonl"), ("general", "general.jsonl"))


def led(windows: Tensor, bos: int) -> Tensor:
    """The windows with BOS in front of each that does not begin with it, without their last token."""
    shifted = torch.cat([torch.full_like(windows[:, :1], bos), windows[:, :-1]], dim=1)
    return torch.where(windows[:, :1] == bos, windows, shifted)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "texts", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/requant-bos"))
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4000, help="scored tokens of each set")
    return parser.parse_args()


def losses(
    checkpoint: Any, sets: Sequence[ev.EvalSet], references: Mapping[str, Path], **options: Any
) -> dict[str, float]:
    """Loss and KL of a model on each set."""
    row: dict[str, float] = {}
    for s in sets:
        scores = score(checkpoint, s, batch=8, reference=references[s.name], **options)
        assert scores.kl is not None
        row |= {f"{s.name} loss": float(scores.nll.mean()), f"{s.name} KL": float(scores.kl.mean())}
    return row


def main() -> None:
    args = arguments()
    from transformers import AutoTokenizer

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(str(args.model))
    bos = tokenizer.bos_token_id
    read: Any = lambda name: tokenize(TextSource(path=args.texts / name), tokenizer)  # noqa: E731
    entries = [
        (n, [replace(d, ids=(bos, *d.ids), scored=(True, *d.scored)) for d in read(n)], 0.5)
        for n in ("train.jsonl", "general-calibration.jsonl")
    ]
    sets = [
        ev.make_set(n, [ev.Document(d.ids[:128]) for d in read(f)], window=512, bos_id=bos, tokens=args.tokens)
        for n, f in SETS
    ]
    args.work.mkdir(parents=True, exist_ok=True)
    sources = variants.VariantSources.of_checkpoint(args.model)
    model = variants.load("merged", sources, device=device, dtype=torch.float32)
    references = {s.name: args.work / f"{s.name}.safetensors" for s in sets}
    floor = {
        f"{s.name} loss": float(score(model, s, batch=8, device=device, write_reference=references[s.name]).nll.mean())
        for s in sets
    }
    del model
    rows: list[dict[str, Any]] = [{"windows": "16 bit"} | floor]
    for bits, seed in itertools.product(args.bits, args.seeds):
        windows = packing.calibration_windows(
            entries, samples=args.samples, length=args.length, seed=seed, bos=None, eos=tokenizer.eos_token_id
        )
        for kind, chosen in (("anywhere", windows), ("BOS", led(windows, bos))):
            row: dict[str, Any] = {"bits": bits, "seed": seed, "windows": kind}
            row["with BOS"] = int((chosen[:, 0] == bos).sum())
            row |= {
                k: v - floor.get(k, 0.0) for k, v in quantized(args, chosen, bits, device, sets, references).items()
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            args.out.write_text(json.dumps({"device": str(device), "rows": rows}, indent=1) + "\n")


def quantized(
    args: argparse.Namespace, windows: Tensor, bits: int, device: torch.device, sets: Sequence[ev.EvalSet],
    references: Mapping[str, Path],
) -> dict[str, float]:  # fmt: skip
    """Losses and KL of the model quantized on these windows, and the seconds that it took."""
    out = args.work / "checkpoint"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    settings, started = Settings(grid=Grid(bits, args.group), sweeps=2, correct=0.5), time.perf_counter()
    quantize.quantize(args.model, out, windows, settings, dtype=torch.bfloat16, device=device)
    seconds = time.perf_counter() - started
    model = variants.quantized(out, device=device, dtype=torch.float32)
    return {"seconds": round(seconds, 1)} | losses(model, sets, references, device=device)


if __name__ == "__main__":
    main()
