"""Damping, scale search and merge dtype at 2 to 8 bits, on the demo's held-out texts.

    python bench/low_bits.py --base work/base-nf4 --adapter adapter --texts work/texts --out FILE

Every row is quantized once for each calibration seed. kl: mean KL divergence a token from the merged model in fp32,
nll: mean increase of the loss; both of the two sets' tokens together, in nats. farthest: the largest relative distance
of a weight from its source's; cosine: the smallest cosine between the two. Meant for a GPU; runs anywhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "pipeline"), str(ROOT / "eval"), str(ROOT / "bench")]

from settings import texts

from requant import merge, quantize
from requant.adapters import peft_directory
from requant.checkpoint.reader import Checkpoint
from requant.data import packing
from requant.evaluate import variants
from requant.formats.registry import open_quantized
from requant.numerics import gptq, grid
from requant.numerics.grid import Grid
from requant.quantize.plan import Settings
from requant.run import prepare

Level = Callable[[Tensor], Tensor]
FINE = torch.tensor((-0.75, -0.5, -0.25, 0.25, 0.5, 0.75))


def trimmed(share: float) -> Level:
    """Mean without the largest `share` of the values."""
    return lambda d: d.sort().values[: max(1, len(d) - max(1, round(share * len(d))))].mean()


LEVELS: dict[str, Level] = {
    "mean": lambda d: d.mean(),
    "median": lambda d: d.median(),
    "without the top 1 %": trimmed(0.01),
    "without the top 5 %": trimmed(0.05),
    "mean, at most 4 medians": lambda d: torch.minimum(d.mean(), 4 * d.median()),
}


def evenly(high: float, low: float, steps: int) -> Callable[[Grid], tuple[Tensor, Tensor]]:
    """Shares of the range from `high` to `low`, for every grid."""

    def shrinks(_: Grid) -> tuple[Tensor, Tensor]:
        coarse = torch.linspace(high, low, steps)
        return coarse, (coarse[0] - coarse[1]) * FINE

    return shrinks


def by_bits(low: float, step: float, over: float = 1.0) -> Callable[[Grid], tuple[Tensor, Tensor]]:
    """From half / (half - 1), at which the short side reaches the largest weight, down to `low`."""

    def shrinks(of: Grid) -> tuple[Tensor, Tensor]:
        half = of.levels // 2
        high = over * half / (half - 1) if of.symmetric else over
        coarse = torch.linspace(high, low, 1 + max(1, round((high - low) / step)))
        return coarse, (coarse[0] - coarse[1]) * FINE

    return shrinks


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting. source: dtype of the merged checkpoint that is quantized."""

    bits: int = 4
    level: str = "mean"
    search: str = "now"
    damp: float = 0.05
    correct: float = 0.5
    sweeps: int = 2
    symmetric: bool = True
    source: str = "float16"

    @property
    def name(self) -> str:
        changed = {k: v for k, v in vars_of(self).items() if v != getattr(Row(), k) and k != "bits"}
        return ", ".join([f"{self.bits} bits", *(f"{k} {v}" for k, v in changed.items())])


def vars_of(row: Row) -> dict[str, Any]:
    return {k: getattr(row, k) for k in Row.__dataclass_fields__}


SEARCHES: dict[str, Callable[[Grid], tuple[Tensor, Tensor]]] = {
    "now": grid.shrinks,
    "1.1 to 0.42": evenly(1.1, 0.42, 13),
    "to half/(half-1)": by_bits(0.42, 0.0567),
    "to half/(half-1), low 0.3": by_bits(0.30, 0.0567),
    "to half/(half-1), 1.05 over": by_bits(0.42, 0.0567, over=1.05),
    "low 0.75, step 0.025": by_bits(0.75, 0.025),
    "low 0.85, step 0.0125": by_bits(0.85, 0.0125),
}


def rows(which: str) -> Iterator[Row]:
    """The settings of one question."""
    for bits in (2, 3, 4):
        if which == "level":
            yield from (Row(bits=bits, level=name, damp=0.02) for name in LEVELS)
            yield from (Row(bits=bits, level=n, damp=d) for n in ("mean", "median") for d in (0.005, 0.05, 0.1, 0.2))
        if which == "search":
            wide = list(SEARCHES)[1:5]
            yield from (Row(bits=bits, search=name) for name in wide)
            yield from (Row(bits=bits, search=name, symmetric=False) for name in wide)
        if which == "solver":
            yield from (Row(bits=bits, correct=share) for share in (0.0, 0.25, 0.5, 0.75))
            yield from (Row(bits=bits, sweeps=count) for count in (0, 4, 8))
    if which == "search":
        fine = ("1.1 to 0.42", "to half/(half-1)", "low 0.75, step 0.025", "low 0.85, step 0.0125")
        yield from (Row(bits=8, search=name) for name in fine)
    if which == "source":
        yield from (Row(bits=b, source=s) for b in (4, 8) for s in ("float32", "float16", "bfloat16"))


@contextmanager
def patched(row: Row) -> Iterator[None]:
    """The solver with a row's damping and search."""
    before = gptq.factorize, grid.shrinks

    def factorize(hessian: Tensor, order: Tensor, damp: float, *rest: Any) -> Any:
        diagonal = hessian.diagonal()
        return before[0](hessian, order, damp * float(LEVELS[row.level](diagonal) / diagonal.mean()), *rest)

    gptq.factorize, grid.shrinks = factorize, SEARCHES[row.search]
    try:
        yield
    finally:
        gptq.factorize, grid.shrinks = before


class Scorer:
    """Mean KL divergence and loss of a model against a reference, on all windows of some sets."""

    def __init__(self, reference: Any, sets: list[Any], device: torch.device, limit: int | None) -> None:
        self.device = device
        self.windows = [w.ids for s in sets for w in s.windows][:limit]
        self.batches = list(self._batches(8))
        self.reference = [self._logp(reference, ids).half() for ids in self.batches]

    def _batches(self, batch: int) -> Iterator[Tensor]:
        lengths: dict[int, list[Tensor]] = {}
        for w in self.windows:
            lengths.setdefault(len(w), []).append(w)
        for many in lengths.values():
            yield from torch.split(torch.stack(many), batch)

    @torch.no_grad()
    def _logp(self, model: Any, ids: Tensor) -> Tensor:
        return model(input_ids=ids.to(self.device), use_cache=False).logits[:, :-1].float().log_softmax(-1)

    def __call__(self, model: Any) -> tuple[float, float]:
        kl = nll = count = 0.0
        for ids, kept in zip(self.batches, self.reference, strict=True):
            known, got = kept.float().log_softmax(-1), self._logp(model, ids)
            kl += float((known.exp() * (known - got)).sum())
            target = ids[:, 1:, None].to(self.device)
            nll += float((known - got).gather(-1, target).sum())
            count += target.numel()
        return kl / count, nll / count


def distances(out: Path, merged: Path) -> tuple[float, float, str]:
    """(largest relative distance of a weight from its source's, smallest cosine, name of the farthest)."""
    reader, source = open_quantized(out), Checkpoint(merged)
    found = []
    for name in reader.quantized:
        q, w = reader.read(name).float(), source.read(name).float()
        found.append((float((q - w).norm() / w.norm()), float((q * w).sum() / q.norm() / w.norm()), name))
    return max(found)[0], min(f[1] for f in found), max(found)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "adapter", "texts", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("/tmp/requant-low-bits"))
    parser.add_argument("--questions", default="level,search,solver,source")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--limit", type=int, help="rows of each question, to try the script out")
    parser.add_argument("--windows", type=int, help="evaluation windows, likewise")
    parser.add_argument("--seconds", type=float, default=1e9, help="no new row after so many")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    begun = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = False
    tokenizer = AutoTokenizer.from_pretrained(str(args.base))
    plan, _ = prepare.plan_merge(args.base, peft_directory.load(args.adapter), None, trust_remote_code=False)
    entries, sets = texts(args.texts, tokenizer)
    merged = {}
    for dtype in ("float32", "float16", "bfloat16"):
        merged[dtype] = args.work / dtype
        merge.merge(plan, merged[dtype], dtype=dtype)
    sources = variants.VariantSources.of_checkpoint(merged["float32"])
    scorer = Scorer(variants.load("merged", sources, device=device, dtype=torch.float32), sets, device, args.windows)
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "samples": args.samples,
        "seeds": args.seeds,
        "tokens": sum(b[:, 1:].numel() for b in scorer.batches),
    }
    done: list[dict[str, Any]] = []
    for which in args.questions.split(","):
        for row in list(rows(which))[: args.limit]:
            if time.monotonic() - begun > args.seconds:
                break
            done.append(
                {"question": which} | measure(row, args, merged[row.source], entries, tokenizer, scorer, device)
            )
            args.out.write_text(json.dumps(facts | {"rows": done}, indent=1) + "\n")


def measure(
    row: Row, args: Any, merged: Path, entries: Any, tokenizer: Any, scorer: Scorer, device: torch.device
) -> dict[str, Any]:
    """One row: its numbers for each seed, and their means."""
    settings = Settings(
        grid=Grid(row.bits, 64, symmetric=row.symmetric), sweeps=row.sweeps, correct=row.correct, damp=row.damp
    )
    numbers, started, far = [], time.monotonic(), (0.0, 1.0, "")
    for seed in range(args.seeds):
        windows = packing.calibration_windows(
            entries, samples=args.samples, length=512, seed=seed, bos=None, eos=tokenizer.eos_token_id
        )
        out = args.work / "quantized"
        out.mkdir(exist_ok=True)
        for file in out.iterdir():
            file.unlink()
        with patched(row):
            quantize.quantize(merged, out, windows, settings, dtype=torch.bfloat16, device=device)
        numbers.append(scorer(variants.quantized(out, device=device, dtype=torch.float32)))
        if seed == 0:
            far = distances(out, merged)
    kl, nll = (statistics.mean(n[i] for n in numbers) for i in (0, 1))
    print(f"{row.name:60} kl {kl:.5f} nll {nll:+.5f} far {far[0]:.3f} cos {far[1]:.3f} {far[2]}", flush=True)
    return {
        "setting": row.name, "kl": kl, "nll": nll, "kl_by_seed": [n[0] for n in numbers],
        "nll_by_seed": [n[1] for n in numbers], "farthest": far[0], "cosine": far[1], "where": far[2],
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
