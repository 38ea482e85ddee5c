"""Checkpoints of other quantizers beside ours, each written by a process of its own.

    python bench/heal_peers.py --merged DIR --rows FILE --bits 4 --out DIR [--iterations 200]

gptqmodel's GPTQ at its defaults, or with --iterations AutoRound. --rows: calibration token ids as JSON. bench/heal.py
starts it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from heal_lab import DEVICE

from requant.quantize import gptqmodel_engine


def gptqmodel(args: argparse.Namespace, rows: torch.Tensor) -> None:
    """Write gptqmodel's checkpoint at its defaults."""
    from transformers import AutoConfig

    args.out.mkdir(exist_ok=True)
    stored = AutoConfig.from_pretrained(str(args.merged)).dtype
    gptqmodel_engine.quantize_by_defaults(
        args.merged, args.out, rows, bits=int(args.bits), group_size=64, dtype=stored, device=DEVICE
    )


def autoround(args: argparse.Namespace, rows: torch.Tensor) -> None:
    """Write AutoRound's, with so many iterations and its defaults for the rest."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(str(args.merged), dtype="auto")
    rounder = AutoRound(
        model, tokenizer=AutoTokenizer.from_pretrained(str(args.merged)), bits=int(args.bits), group_size=64, sym=True,
        dataset=list(rows.split(8)), iters=args.iterations, nsamples=len(rows), seqlen=rows.shape[1],
        device_map=DEVICE.type,
    )  # fmt: skip
    rounder.quantize_and_save(str(args.out), format="auto_gptq")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("merged", "rows", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--bits", default="4")
    parser.add_argument("--iterations", type=int, default=0)
    args = parser.parse_args()
    rows = torch.tensor(json.loads(args.rows.read_text()))
    (autoround if args.iterations else gptqmodel)(args, rows)


if __name__ == "__main__":
    main()
