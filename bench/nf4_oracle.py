"""Is our NF4/FP4 codec bit-exact against bitsandbytes on this device?

Prints one line a case and a verdict.

python bench/nf4_oracle.py [--device cuda]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as bnb
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pipeline"))
from requant.numerics import nf4


def case(
    quant_type: nf4.QuantType,
    nested: bool,
    blocksize: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    device: str,
) -> dict[str, object]:
    """Quantize the same values with both; count differing bytes, scale codes and decoded values."""
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(blocksize + shape[1])) * 0.05).to(dtype)
    packed, state = bnb.quantize_4bit(
        weight.to(device), quant_type=quant_type, blocksize=blocksize, compress_statistics=nested
    )
    ours, absmax = nf4.encode(weight, quant_type, blocksize)
    scale_codes = same_mean = 0
    if nested:
        codes, _, _ = nf4.nest(absmax)
        scale_codes = int((codes != state.absmax.cpu()).sum())
        same_mean = int((nf4.nest(absmax.to(device))[0] != state.absmax).sum())
        offset = float(state.offset)
        theirs = nf4.QuantState(
            quant_type=quant_type, blocksize=blocksize, shape=shape, dtype="float32", nested_offset=offset
        )
        absmax = nf4.unnest(state.absmax.cpu(), state.state2.code.cpu(), state.state2.absmax.cpu(), theirs)
    else:
        theirs = nf4.QuantState(quant_type=quant_type, blocksize=blocksize, shape=shape, dtype="float32")
        absmax = state.absmax.cpu()
    state.dtype = torch.float32
    reference = bnb.dequantize_4bit(packed, state).cpu()
    decoded = nf4.decode(packed.cpu(), absmax, theirs)
    simulated = nf4.round_trip(weight, quant_type, blocksize, double_quant=nested)
    return {
        "bytes_differ": int((ours != packed.cpu().view(torch.uint8).reshape(-1)).sum()),
        "scales": absmax.numel(),
        "scale_codes_differ": scale_codes,
        "scale_codes_differ_with_their_mean": same_mean,
        "simulated_distance": float((simulated - reference).norm() / reference.norm()),
        "decoded_differ": int((decoded != reference).sum()),
        "max_difference": float((decoded - reference).abs().max()),
    }


COUNTS = ("bytes_differ", "scales", "scale_codes_differ", "scale_codes_differ_with_their_mean", "decoded_differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for quant_type in ("nf4", "fp4"):
        for nested in (False, True):
            for blocksize in (64, 128, 4096):
                for shape in ((2048, 2048), (96, 80), (576, 1536)):
                    for dtype in (torch.bfloat16, torch.float16, torch.float32):
                        row = case(quant_type, nested, blocksize, shape, dtype, args.device)
                        rows.append(
                            {
                                "type": quant_type,
                                "nested": nested,
                                "blocksize": blocksize,
                                "shape": shape,
                                "dtype": str(dtype),
                            }
                            | row
                        )
    totals = {k: sum(int(r[k]) for r in rows) for k in COUNTS}  # type: ignore[call-overload]
    totals["worst simulated_distance"] = max(float(r["simulated_distance"]) for r in rows)  # type: ignore[assignment,arg-type]
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    result = {
        "device": device,
        "torch": torch.__version__,
        "bitsandbytes": bitsandbytes.__version__,
        "cases": len(rows),
        "totals": totals,
        "rows": rows,
    }
    for r in rows:
        if r["bytes_differ"] or r["scale_codes_differ"] or r["decoded_differ"]:
            print(r)
    print(json.dumps({k: v for k, v in result.items() if k != "rows"}))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
