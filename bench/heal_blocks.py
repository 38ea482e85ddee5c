"""Bench of scales and codes, end to end and block by block, on the first blocks of a model.

    python recipes/smollm2-pydocs/prepare.py --out DEMO
    python bench/heal_blocks.py --model DEMO/base-16bit --texts DEMO/texts --out FILE [--layers 4] [--bits 4,3] [--steps 60]

Small enough for a CPU. MODEL is a 16-bit checkpoint. Cut to its first blocks it is no good model, but its weights and hidden
states are those of a trained one. KL in nats a token on windows that were not looked at before. FILE is rewritten after
every row.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from heal_lab import DEVICE, ENTRIES, peak, reset_peak, save

from requant import heal, quantize
from requant.data import healing_text, packing
from requant.data.documents import TextSource, tokenize
from requant.data.tokenizer import adds_bos
from requant.evaluate import variants
from requant.heal.job import HealJob
from requant.heal.plan import HealPlan
from requant.heal.settings import HealSettings
from requant.numerics.grid import Grid
from requant.quantize import plan as layout

BOTH = ("scales", "codes")
WHOLE = HealPlan(mode="whole", teacher_resident=True, recompute=False, micro_batch=0)
BLOCKS = HealPlan(mode="blocks", teacher_resident=False, recompute=False, micro_batch=0)
REST = replace(WHOLE, codes=False)
# name -> what is trained, how, codes' rate
WAYS: dict[str, tuple[Any, HealPlan, float]] = {
    "scales, end to end": (("scales",), REST, 1e-3),
    "scales, block by block": (("scales",), replace(BLOCKS, codes=False), 1e-3),
    "scales and codes, end to end": (BOTH, WHOLE, 1e-3),
    "scales and codes, block by block": (BOTH, BLOCKS, 1e-3),
    "the same, then scales end to end": (BOTH, replace(BLOCKS, then=REST), 1e-3),
    "codes' rate 0.003, end to end": (BOTH, WHOLE, 3e-3),
    "codes' rate 0.003, block by block": (BOTH, BLOCKS, 3e-3),
    "codes' rate 0.01, block by block": (BOTH, BLOCKS, 1e-2),
    "codes alone, block by block": (("codes",), BLOCKS, 1e-3),
}


class Bench:
    """The cut model, its text, its tokenizer."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.args, self.work, self.model = args, work, work / "model"
        found: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
        inner = found.get_decoder()
        inner.layers = inner.layers[: args.layers]
        found.config.num_hidden_layers = args.layers
        found.save_pretrained(self.model)
        tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
        tokenizer.save_pretrained(self.model)
        bos, eos = tokenizer.bos_token_id if adds_bos(tokenizer) else None, tokenizer.eos_token_id
        entries = [(name, tokenize(TextSource(path=args.texts / name), tokenizer), 0.5) for name in ENTRIES]
        self.settings = HealSettings(steps=args.steps, batch=args.batch, length=args.window)
        self.calibration = packing.calibration_windows(
            entries, samples=args.samples, length=args.length, seed=0, bos=bos, eos=eos
        )
        self.text = healing_text.pack(
            entries,
            train=args.steps * args.batch,
            held_out=max(32, 2 * args.batch),
            length=args.window,
            seed=0,
            bos=bos,
            eos=eos,
        )

    def quantized(self, bits: int) -> Path:
        out = self.work / f"gptq-{bits}"
        out.mkdir()
        settings = layout.Settings(grid=Grid(bits, 64), order="auto", sweeps=2, correct=0.5)
        quantize.quantize(self.model, out, self.calibration, settings, dtype=torch.bfloat16, device=DEVICE)
        return out

    def healed(self, source: Path, name: str) -> dict[str, Any]:
        tune, plan, rate = WAYS[name]
        micro = self.args.micro or self.args.batch
        then = replace(plan.then, micro_batch=micro) if plan.then else None
        sources = variants.VariantSources.of_checkpoint(self.model)
        work, out = self.work / "work", self.work / "out"
        for folder in (work, out):
            shutil.rmtree(folder, ignore_errors=True)
        out.mkdir()
        job = HealJob(
            source=source,
            teacher=self.model,
            load_teacher=lambda on: variants.load("merged", sources, device=on, dtype=torch.float32),
            text=self.text,
            settings=replace(self.settings, tune=tune, code_lr=rate),
            plan=replace(plan, micro_batch=micro, then=then),
            device=DEVICE,
            work=work,
            key="bench",
        )
        reset_peak()
        started = time.perf_counter()
        told = heal.heal(job, out)
        seconds = round(time.perf_counter() - started, 1)
        codes = told["changed_codes"]
        return {
            "way": name, "kl_start": told["kl_start"], "kl_best": told["kl_best"], "best_step": told["best_step"],
            "judged": told["judged"], "changed": codes and codes["share"], "seconds": seconds, "peak_gb": peak(),
            "sources": told["sources"], "blocks": told.get("blocks"), "passes": told.get("passes"),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "texts", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--only", default="", help="names of rows, split by ;")
    numbers = {"layers": 4, "steps": 60, "batch": 16, "window": 64, "micro": None, "samples": 16, "length": 256}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(args, Path(work))
        for bits in map(int, args.bits.split(",")):
            source = bench.quantized(bits)
            for name in args.only.split(";") if args.only else WAYS:
                row = {"bits": bits} | bench.healed(source, name)
                rows.append(row)
                kl = f"KL {row['kl_start']:.5f} -> {row['kl_best']:.5f}"
                print(f"{bits} bits  {name:34} {kl}  step {row['best_step']}, {row['seconds']} s", flush=True)
                asked = {"layers": args.layers, "settings": asdict(bench.settings)}
                reads = dict(zip(bench.text.names, bench.text.reads, strict=True))
                save(args.out, asked | {"reads": reads, "rows": rows})


if __name__ == "__main__":
    main()
