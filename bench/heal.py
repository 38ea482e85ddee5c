"""What healing gives back on the demo's fine-tune, and which settings help.

    python bench/heal.py compare  --base BASE --adapter ADAPTER --texts TEXTS --out FILE [--bits 4,3] [--peer]
    python bench/heal.py ablate   --base BASE --adapter ADAPTER --texts TEXTS --out FILE [--only NAME;NAME] [--budget SECONDS]

compare: NF4 base + adapter -> merged -> GPTQ (ours, and with --peer gptqmodel's) -> healed; all scored in fp32 on both
held-out sets. ablate: one checkpoint, many settings, nothing loaded twice. FILE is rewritten after every row, and every
phase says its seconds. BASE, ADAPTER and TEXTS as the demo's prepare.py makes them. Meant for a GPU; runs anywhere.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "pipeline"), str(ROOT / "eval")]

from requant import (
    adapter,
    blockwise,
    data,
    heal,
    heal_text,
    layout,
    merge,
    prepare,
    quantize,
    student,
    teacher,
    trainer,
    variants,
)
from requant.grid import Grid
from requant.trainer import EndToEnd, Settings, Trainer
from requant_eval import windows as ev
from requant_eval.score import score

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENTRIES = ("train.jsonl", "general-calibration.jsonl")
OWN = "written by the model"
SETS = (("in-domain", "heldout.jsonl"), ("general", "general.jsonl"))
# name: (changes of the default settings, shares of the two texts and of text that the merged model wrote, teacher)
HALF = (0.5, 0.5, 0.0)
ABLATIONS: dict[str, tuple[dict[str, Any], tuple[float, float, float], str]] = {
    "default": ({}, HALF, "merged"),
    "+ norms": ({"tune": ("scales", "norms")}, HALF, "merged"),
    "lr 2e-2": ({"lr": 2e-2}, HALF, "merged"),
    "lr 7e-3": ({"lr": 7e-3}, HALF, "merged"),
    "lr 5e-3, 240 steps": ({"lr": 5e-3, "steps": 240}, HALF, "merged"),
    "lr 5e-3": ({"lr": 5e-3}, HALF, "merged"),
    "a third written by the model": ({}, (0.34, 0.33, 0.33), "merged"),
    "two thirds in-domain": ({}, (0.67, 0.33, 0.0), "merged"),
    "target adapter": ({}, HALF, "adapter"),
    "50 steps": ({"steps": 50}, HALF, "merged"),
    "batch 4": ({"batch": 4}, HALF, "merged"),
    "block by block": ({"mode": "blocks", "steps": 50}, HALF, "merged"),
    "in-domain text only": ({}, (1.0, 0.0, 0.0), "merged"),
    "general text only": ({}, (0.0, 1.0, 0.0), "merged"),
    "500 steps": ({"steps": 500}, HALF, "merged"),
    "seed 1": ({"seed": 1}, HALF, "merged"),
}


def sync() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


@contextmanager
def phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Time and announce one part of the work."""
    sync()
    started = time.perf_counter()
    yield
    sync()
    seconds[name] = round(time.perf_counter() - started, 2)
    print(f"[{seconds[name]:7.1f} s] {name}", flush=True)


class Bench:
    """Tokenizer, texts, merged model and its floor; one fp32 model into which every candidate's weights are put."""

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self.args, self.seconds = args, {}
        self.rows: list[dict[str, Any]] = []
        self.base, self.work = args.base, args.work
        shutil.rmtree(self.work, ignore_errors=True)
        self.merged = self.work / "merged"
        self.merged.mkdir(parents=True)
        self.tokenizer = AutoTokenizer.from_pretrained(str(args.base))
        with phase("merge", self.seconds):
            plan, _ = prepare.plan_merge(args.base, adapter.load(args.adapter), None, False)
            merge.merge(plan, self.merged, dtype="auto")
        self.documents = {n: data.tokenize(data.Source(path=args.texts / n), self.tokenizer) for n in ENTRIES}
        self.places = variants.Places(args.base, args.adapter, self.merged, self.merged, None, {})
        with phase("score merged", self.seconds):
            self.sets = [self._set(name, file) for name, file in SETS]
            self.judge = variants.load("merged", self.places, device=DEVICE, dtype=torch.float32)
            self.floor = self.scored()
        self.parameters = dict(self.judge.named_parameters())

    def _set(self, name: str, file: str) -> ev.EvalSet:
        rows = data.tokenize(data.Source(path=self.args.texts / file), self.tokenizer)
        return ev.make_set(name, [ev.Document(d.ids) for d in rows], window=512, bos_id=None, tokens=self.args.tokens)

    def scored(self) -> dict[str, float]:
        """Mean NLL of what `judge` holds now, by set."""
        batch = 16 if DEVICE.type == "cuda" else 4
        return {s.name: float(score(self.judge, s, batch=batch, device=DEVICE).nll.mean()) for s in self.sets}

    @torch.no_grad()
    def losses(self, path: Path, values: dict[str, torch.Tensor] | None = None) -> dict[str, float]:
        """Log-perplexity lost against the merged model by the checkpoint in `path`, some tensors replaced by `values`."""
        checkpoint, v2 = student.Checkpoint(path), student.is_v2(path)
        names = student.skeleton.tensor_names(self.judge, student.stored_names(checkpoint))
        for parameter, stored in names.items():
            stem = stored.removesuffix(".weight")
            if stored in checkpoint:
                value = (values or {}).get(stored, checkpoint.read(stored))
            else:
                codes = student.read_linear(checkpoint, stem, v2, DEVICE)
                scale = (values or {}).get(f"{stem}.scales", codes.scale).to(DEVICE)
                value = (codes.centred(torch.float32) * scale[..., None]).flatten(1)
                value = value if codes.order is None else value[:, torch.argsort(codes.order)]
            if parameter in self.parameters:
                self.parameters[parameter].copy_(value.to(DEVICE))
        return {name: nll - self.floor[name] for name, nll in self.scored().items()}

    def add(self, row: dict[str, Any]) -> None:
        """Keep and show one row; the file is whole after each."""
        self.rows.append(row)
        print(
            "  "
            + "  ".join(
                f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}"
                for k, v in row.items()
                if not isinstance(v, list | dict)
            )
        )
        save(self.args.out, {"floor": self.floor, "rows": self.rows, "seconds": self.seconds})

    def quantized(self, bits: int) -> Path:
        """Our GPTQ of the merged model, as the demo's recipe asks for it."""
        out = self.work / f"ours-{bits}"
        out.mkdir()
        settings = layout.Settings(Grid(bits, 64), "auto", 2, 0.5)
        quantize.quantize(
            self.merged, out, self.calibration(), settings, dtype=torch.bfloat16, device=DEVICE,
        )  # fmt: skip
        return out

    def calibration(self) -> torch.Tensor:
        shares = (self.args.share, 1 - self.args.share)
        entries = [(name, self.documents[name], share) for name, share in zip(ENTRIES, shares, strict=True)]
        return data.calibration_windows(
            entries, samples=self.args.samples, length=self.args.length, seed=0, bos=None,
            eos=self.tokenizer.eos_token_id,
        )  # fmt: skip

    def peer(self, bits: int) -> Path:
        """gptqmodel's GPTQ of the same model and calibration windows, its defaults for the rest; a process of its own."""
        out, rows = self.work / f"gptqmodel-{bits}", self.work / "rows.json"
        rows.write_text(json.dumps(self.calibration().tolist()))
        command = [
            sys.executable,
            __file__,
            "peer",
            "--merged",
            str(self.merged),
            "--rows",
            str(rows),
            "--bits",
            str(bits),
            "--out",
            str(out),
        ]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"gptqmodel failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
        return out

    def windows(self, settings: Settings, shares: tuple[float, float, float] = HALF) -> tuple[torch.Tensor, int]:
        if shares[2] and OWN not in self.documents:
            with phase("text written by the merged model", self.seconds):
                self.documents[OWN] = self.written()
        names = [*ENTRIES, OWN]
        entries = [(n, self.documents[n], share) for n, share in zip(names, shares, strict=True) if share]
        return heal_text.pack(
            entries, train=settings.steps * settings.batch, held=2 * settings.batch, length=settings.length,
            seed=settings.seed, bos=None, eos=self.tokenizer.eos_token_id,
        )  # fmt: skip

    @torch.no_grad()
    def written(self, documents: int = 256, given: int = 32) -> list[data.Tokens]:
        """Text sampled from the merged model: what it makes of the first tokens of windows of both texts."""
        model = self.model("merged")
        torch.manual_seed(0)
        count = documents if DEVICE.type == "cuda" else 4
        streams = [torch.tensor([t for d in self.documents[n] for t in d.ids]) for n in ENTRIES]
        starts = [torch.randint(len(s) - given, (count // 2,)) for s in streams]
        begun = torch.cat([s[a[:, None] + torch.arange(given)] for s, a in zip(streams, starts, strict=True)]).to(
            DEVICE
        )
        out = model.generate(
            begun, attention_mask=torch.ones_like(begun), do_sample=True, top_k=0, temperature=1.0,
            min_length=self.args.window, max_length=self.args.window, pad_token_id=0,
        )  # fmt: skip
        return [data.Tokens(tuple(row), (True,) * len(row), 0) for row in out.tolist()]

    def model(self, name: str) -> Any:
        """A teacher: in the merged file's 16 bit on a GPU, fp32 on a CPU."""
        dtype = torch.float16 if DEVICE.type == "cuda" and name == "merged" else teacher.product_dtype(DEVICE)
        return variants.load(name, self.places, device=DEVICE, dtype=dtype)


def save(out: Path, result: dict[str, Any]) -> None:
    packages = ("torch", "transformers", "peft", "triton", "gptqmodel")
    found = {p: v for p in packages if (v := _version(p))}
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"cpu, {os.cpu_count()} cores"
    about = {"date": time.strftime("%Y-%m-%d"), "device": device, "versions": found, "command": " ".join(sys.argv[1:2])}
    out.write_text(json.dumps(about | result, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None


def base_settings(args: argparse.Namespace) -> Settings:
    return Settings(steps=args.steps, batch=args.batch, length=args.window)


def heal_whole(
    bench: Bench, path: Path, settings: Settings, taught: Any, windows: torch.Tensor, held: int, micro: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Heal in memory: (row, best values)."""
    reset_peak()
    sync()
    started = time.perf_counter()
    pupil = student.load(path, device=DEVICE, dtype=teacher.product_dtype(DEVICE), tune=settings.tune)
    loading = time.perf_counter() - started
    curve = Trainer(
        pupil, EndToEnd(pupil, taught, windows, held, DEVICE), len(windows) - held, held, settings, micro=micro
    ).run(None)
    sync()
    row = {"seconds": round(time.perf_counter() - started, 2), "loading": round(loading, 2), "peak_gb": peak()}
    return row | told(curve), pupil.values()


def told(curve: trainer.Curve) -> dict[str, Any]:
    step, value = curve.best
    return {
        "kl_start": curve.held[0][1], "kl_best": value, "best_step": step, "stopped": curve.stopped,
        "held": curve.held, "train": [round(v, 5) for v in curve.train],
    }  # fmt: skip


def reset_peak() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if DEVICE.type == "cuda" else 0.0


def compare(args: argparse.Namespace) -> None:
    """Unhealed and healed, ours and the peer's, at each width."""
    bench = Bench(args)
    settings = base_settings(args)
    windows, held = bench.windows(settings)
    taught = teacher.Resident(bench.model("merged"), windows, DEVICE)
    for bits in [int(b) for b in args.bits.split(",")]:
        makers = [("ours", bench.quantized), *([("gptqmodel", bench.peer)] if args.peer else [])]
        for maker, make in makers:
            with phase(f"{maker} {bits} bits: quantize", bench.seconds):
                path = make(bits)
            bench.add({"checkpoint": f"{maker} {bits} bits", "healed": False} | bench.losses(path))
            with phase(f"{maker} {bits} bits: heal", bench.seconds):
                row, values = heal_whole(bench, path, settings, taught, windows, held, args.micro or args.batch)
            written = bench.work / f"{path.name}-healed"
            written.mkdir()
            heal.write(path, written, values, {"healer": ["bench"]})
            loss = bench.losses(written)
            bench.add({"checkpoint": f"{maker} {bits} bits", "healed": True} | loss | row | heal.movement(path, values))


def ablate(args: argparse.Namespace) -> None:
    """Every setting alone, from the same checkpoint; stops before the budget is spent."""
    started = time.perf_counter()
    bench = Bench(args)
    with phase("quantize", bench.seconds):
        path = args.checkpoint or bench.quantized(int(args.bits.split(",")[0]))
    bench.add({"setting": "unhealed"} | bench.losses(path))
    taught: dict[str, Any] = {}
    rate = 0.0
    for name, (changes, shares, target) in ABLATIONS.items():
        if not any(part in name for part in args.only.split(";")):
            continue
        own = dict(changes)
        mode = own.pop("mode", "whole")
        factor = {k: getattr(args, k) / v for k, v in (("steps", 150), ("batch", 16))}
        for key in factor.keys() & own.keys():
            own[key] = max(1, round(own[key] * factor[key]))
        settings = replace(base_settings(args), **own)
        left = args.budget - (time.perf_counter() - started)
        if rate * settings.steps * settings.batch > left:
            print(f"  {name}: left out, {left:.0f} s left", flush=True)
            continue
        windows, held = bench.windows(settings, shares)
        with phase(name, bench.seconds):
            if mode == "blocks":
                row, values = heal_blocks(bench, path, settings, windows, held, args.micro or args.batch)
            else:
                if target not in taught:
                    taught[target] = teacher.Resident(bench.model(target), windows, DEVICE)
                taught[target].windows = windows
                row, values = heal_whole(
                    bench, path, settings, taught[target], windows, held, args.micro or settings.batch
                )
                rate = row["seconds"] / (settings.steps * settings.batch)
            loss = bench.losses(path, values)
        bench.add({"setting": name} | loss | row | {"settings": asdict(settings)})


def heal_blocks(
    bench: Bench, path: Path, settings: Settings, windows: torch.Tensor, held: int, micro: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    reset_peak()
    started = time.perf_counter()
    state = bench.work / "state"
    state.mkdir(exist_ok=True)
    values, curve, blocks = blockwise.heal_blocks(
        path, bench.merged, windows, held, settings, device=DEVICE, micro=micro, state=state, key=str(time.time())
    )
    row = {"seconds": round(time.perf_counter() - started, 2), "peak_gb": peak()} | told(curve)
    return row | {"blocks": blocks}, values


def peer_role(args: argparse.Namespace) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=int(args.bits), group_size=64, sym=True, desc_act=False, device=DEVICE.type)
    model = GPTQModel.load(str(args.merged), config)
    rows = [torch.tensor([r]) for r in json.loads(args.rows.read_text())]
    batch = max(1, (16384 if DEVICE.type == "cuda" else 2048) // rows[0].shape[1])
    model.quantize([{"input_ids": r, "attention_mask": torch.ones_like(r)} for r in rows], batch_size=batch)
    model.save(str(args.out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", choices=("compare", "ablate", "peer"))
    for name in ("base", "adapter", "texts", "out", "merged", "rows", "checkpoint"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--work", type=Path, default=Path("/tmp/requant-heal"))
    parser.add_argument("--bits", default="4")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--only", default="", help="rows whose names hold one of these, split by ;")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds")
    parser.add_argument("--share", type=float, default=0.5, help="of the calibration windows that are in-domain")
    numbers = {
        "samples": 48,
        "length": 512,
        "steps": 150,
        "batch": 16,
        "window": 512,
        "micro": None,
        "tokens": None,
    }
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    started = time.perf_counter()
    {"compare": compare, "ablate": ablate, "peer": peer_role}[args.role](args)
    print(f"{time.perf_counter() - started:.1f} s in all", flush=True)


if __name__ == "__main__":
    main()
