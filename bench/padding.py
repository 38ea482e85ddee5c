"""Bench of padding on the right: every model type, tiny and random.

    PYTHONPATH=pipeline:eval:tests python bench/padding.py [MODEL_TYPE ...] [--out FILE]

Three windows of different lengths share a forward, the last token of the shorter ones repeated. For each type: the
largest difference of their final hidden states from those of each window alone, relative to the largest state, in how
many of the 50 positions there is one, and whether `batches.padding_changes` finds it. Types without a tiny model, or
whose forward wants more than text, are told.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from helpers import tiny

from requant_eval.scoring import batches
from requant_eval.scoring.lm_head import HeadTap

LENGTHS = (24, 17, 9)
SAME = 1e-5  # relative: sums in another order


@torch.inference_mode()
def padded_and_alone(kind: str) -> dict[str, Any]:
    model = tiny.model(kind).eval()
    ids = torch.randint(3, 200, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(7))
    windows, tap = [row[:length] for row, length in zip(ids, LENGTHS, strict=True)], HeadTap(model)
    together = tap.run(model, batches.padded(windows))[0]
    alone = [tap.run(model, window[None])[0][0] for window in windows]
    pairs = [(row[: len(one)], one) for row, one in zip(together, alone, strict=True)]
    apart = torch.cat([(a - b).abs().amax(-1) / b.abs().max() for a, b in pairs])
    return {
        "difference": float(apart.max()),
        "positions": int((apart > SAME).sum()),
        "found": batches.padding_changes(together[-1], alone[-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    for kind in args.kinds or tiny.kinds():
        try:
            rows[kind] = padded_and_alone(kind)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this model type's outcome
            rows[kind] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"}
        print(kind, rows[kind], flush=True)
    tried = {kind: row for kind, row in rows.items() if "failed" not in row}
    summary = {
        "tried": len(tried),
        "same": sum(row["difference"] <= SAME for row in tried.values()),
        "differ and found": sorted(k for k, row in tried.items() if row["difference"] > SAME and row["found"]),
        "differ and not found": sorted(k for k, row in tried.items() if row["difference"] > SAME and not row["found"]),
        "same, but found": sorted(k for k, row in tried.items() if row["difference"] <= SAME and row["found"]),
    }
    print(json.dumps(summary, indent=1))
    if args.out:
        args.out.write_text(json.dumps({"summary": summary, "types": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
