"""What a run takes at published models' sizes, by requant's own plans: disk and memory.

No weights and no GPU are needed: the model is built on the meta device, and the functions that decide in a run
(`quantize.memory`, `heal.plan`, `evaluate.memory`) are asked what they would do with so much free memory.

    python bench/hardware.py [--models NAME ...] [--out FILE]
    python bench/hardware.py --tables FILE     the tables of recipes/README.md and docs/hardware.md from a result

Computed, not measured: what an allocator rounds up and what libraries take is not in it. Times are those of an 8B's
phases on one H200, each scaled by its operations: a 70B's blocks, of which batches wait in host memory on 80 GB, took
more.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

GPUS = (24, 48, 80)  # GB, of which a driver and its context leave this share free
FREE = 0.97
HOST = 128 * 10**9  # bytes of host memory that are free while healing
SAMPLES, LENGTH = 128, 2048  # the defaults of `calibration`
LORA_RANK = 16
_QWEN3_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA: dict[str, Any] = {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
# name -> (model_type, what its published config.json says)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": ("llama", _LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}),
    "llama-3.3-70b": ("llama", _LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}),
    "qwen3-8b": ("qwen3", _QWEN3_8B),
    "qwen3.5-9b": ("qwen3_5", {}),  # the defaults of transformers' class, its vision tower too
    "gemma-3-12b": ("gemma3", {
        "text_config": {"hidden_size": 3840, "intermediate_size": 15360, "num_hidden_layers": 48,
                        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 262208},
        "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
                          "num_attention_heads": 16, "image_size": 896, "patch_size": 14}}),
    "gemma-4-31b": ("gemma4", {
        "text_config": {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 60,
                        "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 256, "global_head_dim": 512,
                        "num_global_key_value_heads": 4, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
                        "sliding_window": 1024, "vocab_size": 262144},
        "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
                          "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72}}),
    "mistral-small-24b": ("mistral3", {}),  # the defaults of transformers' class, its vision tower too
    "gpt-oss-20b": ("gpt_oss", {"num_hidden_layers": 24, "num_local_experts": 32}),
    "qwen3-30b-a3b": ("qwen3_moe", {
        "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
        "tie_word_embeddings": False}),
    "qwen3-vl-8b": ("qwen3_vl", {
        "text_config": _QWEN3_8B,
        "vision_config": {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096,
                          "num_heads": 16, "deepstack_visual_indexes": [8, 16, 24]}}),
    "mistral-7b": ("mistral", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32768, "tie_word_embeddings": False}),
    "qwen2.5-7b": ("qwen2", {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False}),
    "gemma-2-9b": ("gemma2", {
        "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000}),
}  # fmt: skip
IN_16_BIT = {"gpt-oss-20b": "*.experts.*"}  # what `quantize.experts: auto` leaves
GROUPS = {"gpt-oss-20b": 64}  # elsewhere 128, which does not divide its 2,880 inputs
RESULTS = Path(__file__).parent / "results"
PHASES = RESULTS / "2026-11-27-speed-8b-16-128-h200.json"  # half of an 8B on one H200
LIKE = "llama-3.1-8b"  # the model that was measured
LAWS = {  # phase -> what its time grows with
    "hessian": "squares", "drift": "squares", "forward to the stages": "weights", "factor": "cubes",
    "correction": "products", "scale search": "outputs", "column loop": "products", "sweeps": "products",
    "losses": "products", "pack": "outputs",
}  # fmt: skip
TIMES = {  # bench/NOTES.md; blocks that were measured, times the model's. Elsewhere computed
    "llama-3.1-8b": "33 s, measured (H100)",
    "llama-3.3-70b": "8 min, of 4 blocks measured (H100)",
    "qwen3-30b-a3b": "6 min, of 2 and 4 blocks measured (H200)",
    "gpt-oss-20b": "3 min at most, by the layers of qwen3-30b-a3b, measured (H200)",
}


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes, but for parameters: of the model, on disk, and on the GPU while quantizing."""

    parameters: int
    quantized: int  # parameters in quantized linears
    merged: int
    gptq: int
    bits: float  # a weight of the quantized linears
    fp32_tensor: int  # the merge holds one such
    paused_on_gpu: int  # quantizing, with all calibration batches waiting on the GPU
    least_on_gpu: int  # with them in host memory
    states_on_host: int  # what waits there
    seconds: float  # quantizing on one H200, computed of an 8B's measured phases
    on: dict[str, dict[str, str]]  # GPU -> what is done there; heal and evaluate with 0.85 of what is free at most


class Model:
    """A published model on the meta device, with its 4-bit plan."""

    def __init__(self, name: str) -> None:
        from transformers import AutoConfig

        from requant.checkpoint.writer import Slot
        from requant.modeling import skeleton
        from requant.numerics.grid import Grid
        from requant.quantize import plan as layout
        from requant.run.check.rehearsal import RandomWeights

        self.name, (kind, changes) = name, MODELS[name]
        self.model: Any = skeleton.build(AutoConfig.for_model(kind, **changes), split=True)
        shapes = RandomWeights(self.model, torch.device("cpu")).shapes
        slots = {n: Slot(n, torch.bfloat16, shape) for n, shape in shapes.items()}
        left = ((IN_16_BIT[name], None),) if name in IN_16_BIT else ()
        self.settings = layout.Settings(grid=Grid(4, GROUPS.get(name, 128)), sweeps=2, correct=0.5, overrides=left)
        self.plan = layout.plan(slots, self.model, self.settings, torch.bfloat16, where=Path(name))
        tied = skeleton.tied_pair(self.model)
        self.slots = {n: s for n, s in slots.items() if tied is None or n != tied[1]}
        self.windows = torch.zeros(SAMPLES, LENGTH, dtype=torch.int64, device="meta")

    def needs(self) -> Needs:
        from requant.modeling.blocks import block_list
        from requant.quantize import memory
        from requant.quantize.calibration_plan import batch_size

        blocks, weights = block_list(self.model)[1], self._weights()
        walk: Any = SimpleNamespace(blocks=blocks, device=torch.device("cuda"), dtype=torch.bfloat16)
        twice = 1 / memory.unquantized_every(walk, self.windows)
        batch = batch_size(walk.device, self.windows, blocks) * LENGTH
        paused = memory.waiting_bytes(walk, self.windows.numel(), twice)
        width = self.model.get_input_embeddings().embedding_dim
        states = int(2 * self.windows.numel() * width * (1 + twice))
        return Needs(
            parameters=sum(math.prod(s.shape) for s in self.slots.values()),
            quantized=sum(math.prod(s) for s in self.plan.shapes.values()),
            merged=sum(s.nbytes for s in self.slots.values()),
            gptq=sum(s.nbytes for s in self.plan.slots if s.name in self.slots or s.name not in weights),
            bits=round(self.plan.bits_per_weight, 2),
            fp32_tensor=4 * max(math.prod(s.shape) for s in self.slots.values()),
            paused_on_gpu=paused + states,
            least_on_gpu=memory.waiting_bytes(walk, batch, twice),
            states_on_host=states,
            seconds=round(self.seconds(), 1),
            on={f"{gb} GB": self._on(int(FREE * gb * 1e9), paused, memory.MEMORY_SHARE) for gb in GPUS},
        )

    def seconds(self) -> float:
        """The measured phases of an 8B, each times the operations here beside those there."""
        run = json.loads(PHASES.read_text())["runs"]["ours, 16 layers"]
        done = dict(map(tuple, run["blocks_done_at"]))
        start = done[2] - 2 * (done[15] - done[3]) / 12
        here, there = self.operations(), (self if self.name == LIKE else Model(LIKE)).operations()
        return start + sum(2 * run["phases"][phase] * here[law] / there[law] for phase, law in LAWS.items())

    def operations(self) -> Counter[str]:
        """What phases grow with, of all blocks: a group of linears with one input has one Hessian."""
        from requant.modeling.blocks import block_list
        from requant.modeling.families import BY_INPUTS

        text = self.model.config.get_text_config()
        routed = getattr(text, "num_experts_per_tok", None) or 1
        held = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
        total: Counter[str] = Counter()
        for name, module in block_list(self.model)[1].named_modules():
            if getattr(module, "weight", None) is not None and module.weight.ndim == 2:
                total["weights"] += int(module.weight.numel() * (routed / held if ".experts." in name else 1))
        inputs: dict[tuple[str, ...], int] = {}
        for name, (rows, columns) in self.plan.shapes.items():
            parent, _, leaf = name.rpartition(".")
            inputs[(parent, leaf if leaf in BY_INPUTS else "")] = columns
            total += Counter(products=rows * columns**2, outputs=rows * columns)
        return total + Counter(squares=sum(n**2 for n in inputs.values()), cubes=sum(n**3 for n in inputs.values()))

    def _weights(self) -> set[str]:
        return {n for n, _ in self.model.named_parameters(remove_duplicate=False)}

    def _on(self, free: int, paused: int, share: float) -> dict[str, str]:
        return {
            "quantize": "batches wait on the GPU" if paused < share * free else "batches wait in host memory",
            "heal": self._healing(free),
            "evaluate": self._scoring(free),
        }

    def _healing(self, free: int) -> str:
        from requant.data.healing_text import HealingText
        from requant.errors import InputError
        from requant.heal import model_size
        from requant.heal import plan as heal
        from requant.heal.settings import HealSettings

        settings = HealSettings()
        windows = torch.zeros(SAMPLES * LENGTH // settings.length, settings.length, dtype=torch.int64)
        size = model_size.ModelSize.of(self.model, self.plan.grids)
        text = HealingText(windows, choosing=32, judging=32)
        try:
            found = heal.choose_plan(
                size, settings, text, device=torch.device("cuda"), free=free, free_host=HOST, rate=1e15
            )
        except InputError:
            return "does not fit"
        what = "scales and codes" if found.codes else "scales"
        how = {"whole": "end to end", "blocks": "block by block"}[found.mode]
        then = ", then scales end to end" if found.then else ""
        return f"{what}, {how}{then}, {found.peak / 1e9:.0f} GB"

    def _scoring(self, free: int) -> str:
        from requant.evaluate.memory import VariantSize
        from requant.modeling import skeleton
        from requant.runtime.device import PROFILES, USABLE
        from requant_eval.scoring.score_loop import logit_bytes

        names = skeleton.quantizable(self.model, ())
        linears: list[Any] = [self.model.get_submodule(name) for name in names]
        packed = sum(m.weight.numel() for m in linears)
        adapter = sum(4 * LORA_RANK * sum(m.weight.shape) for m in linears)
        sizes = {"16-bit variants": VariantSize.of_model(self.model), "base and adapter": VariantSize.of_model(
            self.model, packed, adapter)}  # fmt: skip
        takes = {n: s.resident(2, PROFILES["cuda"].scoring_tokens, logit_bytes("cuda")) for n, s in sizes.items()}
        return "; ".join(
            f"{name} {'whole' if nbytes <= USABLE * free else 'block by block'} ({nbytes / 1e9:.0f} GB whole)"
            for name, nbytes in takes.items()
        )


def sizes_table(models: dict[str, Any]) -> list[str]:
    """Rows of recipes/README.md: disk, and memory while quantizing."""
    rows = [
        "| recipe | parameters | merged, 16 bit | result, 4 bits | quantizing: GPU at least | with all on the GPU | time |"
    ]
    rows.append("|---|---|---|---|---|---|---|")
    for name, m in models.items():
        rows.append(
            f"| [{name}]({name}/recipe.yaml) | {m['parameters'] / 1e9:.1f} B | {_gb(m['merged'])} | {_gb(m['gptq'])} | "
            f"{_gb(m['least_on_gpu'])} | {_gb(m['paused_on_gpu'])} | {_time(name, m['seconds'])} |"
        )
    return rows


def gpus_table(models: dict[str, Any]) -> list[str]:
    """Rows of docs/hardware.md: what is done on which GPU."""
    rows = [
        "| model | GPU | calibration batches wait | healing | scoring the 16-bit variants | scoring base and adapter |"
    ]
    rows.append("|---|---|---|---|---|---|")
    for name, m in models.items():
        for gpu, how in m["on"].items():
            whole = [part.split(" (")[0].removeprefix(f"{what} ") for what, part in zip(
                ("16-bit variants", "base and adapter"), how["evaluate"].split("; "), strict=True)]  # fmt: skip
            waits = how["quantize"].removeprefix("batches wait ")
            rows.append(f"| {name} | {gpu} | {waits} | {how['heal']} | {whole[0]} | {whole[1]} |")
    return rows


def _time(name: str, seconds: float) -> str:
    shown = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"
    return TIMES.get(name, f"{shown}, computed (H200)")


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes < 20e9 else f"{nbytes / 1e9:.0f} GB"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tables", type=Path)
    args = parser.parse_args()
    if args.tables:
        models = json.loads(args.tables.read_text())["models"]
        print("\n".join([*sizes_table(models), "", *gpus_table(models)]))
        return
    result: dict[str, Any] = {
        "versions": {p: version(p) for p in ("torch", "transformers")} | {"python": platform.python_version()},
        "calibration": f"{SAMPLES} x {LENGTH}", "format": "4 bits, groups of 128 (gpt-oss: 64)", "models": {},
    }  # fmt: skip
    for name in args.models:
        result["models"][name] = asdict(Model(name).needs())
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
