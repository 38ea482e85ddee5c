"""The least time that each stage of a finished run can take on this machine.

    python bench/limits.py RUN

Operations over the rates of products that are measured here (16-bit, and fp32 as the stage computes), and bytes over the
measured rates of memory, of copies from the host and of the disk (written and synced). A lower bound: no launches, no
import, no tokenizing; elementwise work, softmax and attention's scores are left out. bench/whole.py writes the same
beside what a run took. Operations of a product: two for each multiplication.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "pipeline"), str(ROOT / "eval")]

from requant.heal.teacher import product_dtype
from requant.runtime.device import pick_device

DISK = 2**28  # bytes written for the disk's rate
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second: operations of products, bytes of copies."""

    half: float
    full: float  # fp32, as torch computes it by default
    memory: float  # read and written inside the device
    to_device: float  # from page-locked memory; without a GPU that of the memory
    disk: float


@dataclass(frozen=True)
class Sizes:
    """linears: (outputs, inputs) of each quantized matrix by its name; head: (vocabulary, hidden)."""

    linears: dict[str, tuple[int, int]]
    head: tuple[int, int]

    @property
    def weights(self) -> int:
        return sum(math.prod(shape) for shape in self.linears.values())

    @property
    def hessians(self) -> list[int]:
        """Inputs of each Hessian; linears of one parent with equally many inputs are taken to share theirs."""
        return [n for _, n in {(name.rpartition(".")[0], shape[1]) for name, shape in self.linears.items()}]

    def forward(self, tokens: int, heads: int = 1) -> int:
        """Operations of a forward of so many tokens; heads: products with the head."""
        return 2 * tokens * (self.weights + heads * math.prod(self.head))


def measured_rates(device: torch.device) -> Rates:
    """Each the best of five."""

    def best(amount: float, work: Callable[[], Any]) -> float:
        work()
        taken = []
        for _ in range(5):
            wait(device)
            begun = time.perf_counter()
            work()
            wait(device)
            taken.append(time.perf_counter() - begun)
        return amount / min(taken)

    size = 8192 if device.type == "cuda" else 1024
    products = {}
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        products[dtype] = best(2.0 * size**3, lambda a=a, b=b: a @ b)  # type: ignore[misc]
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    memory = best(2.0 * len(source), lambda: target.copy_(source))
    if device.type == "cuda":
        host = torch.zeros(2**28, dtype=torch.uint8, pin_memory=True)
        to_device = best(float(len(host)), lambda: target[: len(host)].copy_(host, non_blocking=True))
    else:
        to_device = memory
    return Rates(products[torch.bfloat16], products[torch.float32], memory, to_device, disk_rate())


def disk_rate() -> float:
    data = os.urandom(DISK)
    with tempfile.TemporaryFile() as file:
        begun = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return DISK / (time.perf_counter() - begun)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def sizes(run: Path) -> Sizes:
    """From the headers of the run's GPTQ checkpoint."""
    linears, head, embeddings = {}, None, None
    bits = {m["name"]: m["bits"] for m in json.loads((run / "report.json").read_text())["facts"]["quantize"]["modules"]}
    for file in sorted((run / "gptq").glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                shape = tensors.get_slice(name).get_shape()
                stem, _, kind = name.rpartition(".")
                if kind == "qweight" and stem in bits:
                    linears[stem] = (shape[1], shape[0] * 32 // bits[stem])
                elif name.endswith("lm_head.weight"):
                    head = (shape[0], shape[1])
                elif name.endswith(("embed_tokens.weight", "wte.weight")):
                    embeddings = (shape[0], shape[1])
    found = head or embeddings
    if found is None or not linears:
        raise SystemExit(f"{run}: no head or no quantized linear in gptq")
    return Sizes(linears, found)


def limits(run: Path, rates: Rates) -> dict[str, dict[str, float]]:
    """Stage -> operations, bytes and the seconds that they take at least."""
    report = json.loads((run / "report.json").read_text())
    facts, size = report["facts"], sizes(run)
    half = getattr(torch, facts["evaluation"]["dtype"]) in HALF
    scoring = rates.half if half else rates.full  # of Hessians too, whose inputs are in the same dtype
    stored = facts["cost"]["bytes"]
    found: dict[str, dict[str, float]] = {}

    def add(stage: str, *parts: tuple[str, float, float]) -> None:
        """parts: (what, amount, rate); they cannot overlap where they are given one by one."""
        row: dict[str, float] = defaultdict(float)
        for what, amount, rate in parts:
            row[what] += amount
            row["seconds"] += amount / rate
        found[stage] = dict(row)

    if "merged" in stored:
        add("merge", ("bytes written", stored["merged"], rates.disk))
    tokens = facts["calibration"]["windows"] * facts["calibration"]["length"]
    solving = sum(rows * n * n for rows, n in size.linears.values()) + sum(n**3 / 3 for n in size.hessians)
    add(
        "quantize",
        ("operations, forward with and without codes", 2 * size.forward(tokens, heads=0), scoring),
        ("operations, Hessians", tokens * sum(n * n for n in size.hessians), scoring),
        ("operations, solving", solving, rates.full),
        ("bytes written", stored["gptq"], rates.disk),
    )
    healed = facts.get("heal")
    if healed and "settings" in healed:
        seen = healed["settings"]["steps"] * healed["settings"]["batch"] * healed["length"]
        looks = len(healed["sources"][0]["held"]) * healed["held_windows"] * healed["length"]
        product = rates.half if product_dtype(torch.device(facts["hardware"]["device"])) in HALF else rates.full
        trained = 4 * size.forward(seen)  # of the student forward and two products backward; of the teacher forward
        add(
            "heal",
            ("operations, steps", trained, product),
            ("operations, held-out windows", size.forward(looks), product),
            ("bytes written", stored.get("healed", 0), rates.disk),
        )
    add("evaluate", *scored(run, report, size, rates, scoring))
    return found


def scored(
    run: Path, report: dict[str, Any], size: Sizes, rates: Rates, scoring: float
) -> Iterable[tuple[str, float, float]]:
    """Forwards of all variants on all sets, and the weights that each step of an answer reads."""
    width = 2 if report["facts"]["evaluation"]["dtype"] != "float32" else 4
    weights = width * (size.weights + math.prod(size.head))
    for section in report["sets"]:
        tokens = section["n_scored"] + section["n_documents"]
        for variant in section["variants"]:
            heads = 1 if variant["name"] == section["reference"] else 2  # the reference's logits, from its states
            yield "operations, scoring", size.forward(tokens, heads=heads), scoring
    variants = report["sets"][0]["variants"]
    yield "bytes to the device", len(variants) * weights, rates.to_device
    answers = report.get("answers") or {}
    if answers.get("items"):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(run / "gptq"))
        for variant in answers["variants"]:
            texts = [item["given"].get(variant["name"], "") for item in answers["items"]]
            steps = max(len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
            yield "bytes of weights read by answers", steps * weights, rates.memory / 2  # a copy reads and writes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    rates = measured_rates(pick_device("auto"))
    print(json.dumps({"rates": vars(rates), "limits": limits(run, rates)}))


if __name__ == "__main__":
    main()
