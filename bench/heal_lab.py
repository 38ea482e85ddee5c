"""Setup of bench/heal.py: a fine-tune's merged model, texts, checkpoints, a scoring model."""

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
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "pipeline"), str(ROOT / "eval")]

from requant import merge, quantize
from requant.adapters import peft_directory
from requant.checkpoint.reader import read_json
from requant.data import healing_text, packing
from requant.data.documents import TextSource, TokenDocument, tokenize
from requant.data.healing_text import HealingText
from requant.data.tokenizer import adds_bos
from requant.evaluate import variants
from requant.formats.registry import open_quantized
from requant.heal import student, teacher
from requant.heal.settings import HealSettings
from requant.heal.trainer import rate_groups
from requant.merge.stored_dtype import overflows_in_float16
from requant.numerics.grid import Grid
from requant.quantize import plan as layout
from requant.run import prepare
from requant_eval.scoring import windows as ev
from requant_eval.scoring.score_loop import score

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENTRIES = ("train.jsonl", "general-calibration.jsonl")
OWN = "written by the model"
SETS = (("in-domain", "heldout.jsonl"), ("general", "general.jsonl"))
HALF = (0.5, 0.5, 0.0)  # of the two texts, and of text that the merged model wrote


class SignedCodes(torch.optim.Optimizer):
    """AdamW on scales and norms; codes move by the rate along the sign of the gradient, without moments."""

    def __init__(self, pupil: student.Student, settings: HealSettings) -> None:
        super().__init__(rate_groups(pupil, settings), {"lr": settings.lr})
        values = [v.offset for v in pupil.trainable if v.unit_of_rate == "value"]
        self.codes = [v.offset for v in pupil.trainable if v.unit_of_rate == "code"]
        self.adam = torch.optim.AdamW(values, lr=settings.lr) if values else None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.adam:
            self.adam.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            self.adam.step()
        for latent in self.codes:
            latent.sub_(self.param_groups[-1]["lr"] * latent.grad.sign())


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
    """Tokenizer, texts, merged model and its floor, and an fp32 model to score candidates.

    Each candidate's weights are loaded into that model.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self.args, self.seconds = args, {}
        self.rows: list[dict[str, Any]] = []
        self.base, self.work = args.base, args.work
        shutil.rmtree(self.work, ignore_errors=True)
        self.merged = self.work / "merged"
        self.merged.mkdir(parents=True)
        self.tokenizer = AutoTokenizer.from_pretrained(str(args.base))
        self.bos = self.tokenizer.bos_token_id if adds_bos(self.tokenizer) else None
        with phase("merge", self.seconds):
            plan, _ = prepare.plan_merge(args.base, peft_directory.load(args.adapter), None, trust_remote_code=False)
            merge.merge(plan, self.merged, dtype="auto")
        self.documents = {n: tokenize(TextSource(path=args.texts / n), self.tokenizer) for n in ENTRIES}
        self.sources = variants.VariantSources(
            base=args.base, adapter=args.adapter, merged=self.merged, gptq=self.merged
        )
        with phase("score merged", self.seconds):
            self.sets = [self._set(name, file) for name, file in SETS]
            self.judge = variants.load("merged", self.sources, device=DEVICE, dtype=torch.float32)
            self.floor = {
                s.name: float(self._score(s, write_reference=self._reference(s)).nll.mean()) for s in self.sets
            }
        self.parameters = dict(self.judge.named_parameters())

    def _set(self, name: str, file: str) -> ev.EvalSet:
        rows = tokenize(TextSource(path=self.args.texts / file), self.tokenizer)
        documents = [ev.Document(d.ids, d.scored) for d in rows]  # of chats the answers, of plain text all
        return ev.make_set(name, documents, window=512, bos_id=self.bos, tokens=self.args.tokens)

    def _reference(self, one: ev.EvalSet) -> Path:
        return self.work / f"reference-{one.name}"

    def _score(self, one: ev.EvalSet, **reference: Path) -> Any:
        return score(self.judge, one, batch=16 if DEVICE.type == "cuda" else 4, device=DEVICE, **reference)

    def scored(self) -> dict[str, float]:
        """What `judge` as it is now loses against the merged model, by set: mean NLL, and mean KL as "NAME KL"."""
        found = {s.name: self._score(s, reference=self._reference(s)) for s in self.sets}
        losses = {name: float(one.nll.mean()) - self.floor[name] for name, one in found.items()}
        return losses | {f"{name} KL": float(one.kl.mean()) for name, one in found.items()}

    @torch.no_grad()
    def losses(self, path: Path, values: dict[str, torch.Tensor] | None = None) -> dict[str, float]:
        """Log-perplexity that the checkpoint in `path` loses against the merged model, and KL from it.

        `values` replace some of its tensors.
        """
        checkpoint = open_quantized(path)
        names = student.skeleton.tensor_names(self.judge, checkpoint)
        for parameter, stored in names.items():
            stem = stored.removesuffix(".weight")
            if stored not in checkpoint.quantized:
                value = (values or {}).get(stored, checkpoint.read(stored))
            else:
                codes = student.read_linear(checkpoint, stem, DEVICE)
                if (other := (values or {}).get(f"{stem}.qweight")) is not None:
                    codes.put(other.to(DEVICE) if codes.order is None else other.to(DEVICE)[:, codes.order])
                scale = (values or {}).get(f"{stem}.scales", codes.scale).to(DEVICE)
                value = (codes.centred(torch.float32) * scale[..., None]).flatten(1)
                value = value if codes.order is None else value[:, torch.argsort(codes.order)]
            if parameter in self.parameters:
                self.parameters[parameter].copy_(value.to(DEVICE))
        return self.scored()

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
        settings = layout.Settings(grid=Grid(bits, 64), order="auto", sweeps=2, correct=0.5)
        quantize.quantize(
            self.merged, out, self.calibration(), settings, dtype=torch.bfloat16, device=DEVICE,
        )  # fmt: skip
        return out

    def calibration(self) -> torch.Tensor:
        shares = (self.args.share, 1 - self.args.share)
        entries = [(name, self.documents[name], share) for name, share in zip(ENTRIES, shares, strict=True)]
        return packing.calibration_windows(
            entries, samples=self.args.samples, length=self.args.length, seed=0, bos=self.bos,
            eos=self.tokenizer.eos_token_id,
        )  # fmt: skip

    def peer(self, bits: int, iterations: int = 0) -> Path:
        """A peer's checkpoint of the same model and calibration windows, made in a process of its own.

        iterations: of AutoRound (200 in its default recipe, 1000 in its best); 0: gptqmodel's GPTQ at its defaults.
        """
        out, rows = self.work / f"peer-{bits}-{iterations}", self.work / "rows.json"
        rows.write_text(json.dumps(self.calibration().tolist()))
        given = {"merged": self.merged, "rows": rows, "bits": bits, "iterations": iterations, "out": out}
        options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, str(Path(__file__).with_name("heal_peers.py")), *options]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"peer failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
        return next(file.parent for file in sorted(out.rglob("config.json")))

    def windows(self, settings: HealSettings, shares: tuple[float, float, float] = HALF) -> HealingText:
        if shares[2] and OWN not in self.documents:
            with phase("text written by the merged model", self.seconds):
                self.documents[OWN] = self.written()
        names = [*ENTRIES, OWN]
        entries = [(n, self.documents[n], share) for n, share in zip(names, shares, strict=True) if share]
        return healing_text.pack(
            entries, train=settings.steps * settings.batch, held_out=2 * settings.batch, length=settings.length,
            seed=settings.seed, bos=self.bos, eos=self.tokenizer.eos_token_id,
        )  # fmt: skip

    @torch.no_grad()
    def written(self, given: int = 32) -> list[TokenDocument]:
        """Text sampled from the merged model, continuing the first tokens of windows of both texts."""
        model = self.model("merged")
        torch.manual_seed(0)
        count = self.args.written if DEVICE.type == "cuda" else 4
        streams = [torch.tensor([t for d in self.documents[n] for t in d.marked(self.bos, None)]) for n in ENTRIES]
        starts = [torch.randint(len(s) - given, (count // 2,)) for s in streams]
        begun = torch.cat([s[a[:, None] + torch.arange(given)] for s, a in zip(streams, starts, strict=True)]).to(
            DEVICE
        )
        out = model.generate(
            begun, attention_mask=torch.ones_like(begun), do_sample=True, top_k=0, temperature=1.0,
            min_length=self.args.window, max_length=self.args.window, pad_token_id=0,
        )  # fmt: skip
        return [TokenDocument(tuple(row), (True,) * len(row), 0) for row in out.tolist()]

    def model(self, name: str) -> Any:
        """A teacher: on a GPU the merged one in float16 where it runs in it, else in bfloat16; fp32 on a CPU."""
        runs = overflows_in_float16(read_json(self.base / "config.json")) is None
        half = DEVICE.type == "cuda" and name == "merged" and runs
        dtype = torch.float16 if half else teacher.product_dtype(DEVICE)
        return variants.load(name, self.sources, device=DEVICE, dtype=dtype)


def save(out: Path, result: dict[str, Any]) -> None:
    packages = ("torch", "transformers", "peft", "triton", "gptqmodel")
    found = {p: v for p in packages if (v := _version(p))}
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"cpu, {os.cpu_count()} cores"
    command = " ".join(Path(a).name if a.startswith("/") else a for a in sys.argv)
    about = {"date": time.strftime("%Y-%m-%d"), "device": device, "versions": found, "command": command}
    out.write_text(json.dumps(about | result, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:
        return None


def reset_peak() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak() -> float:
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if DEVICE.type == "cuda" else 0.0
