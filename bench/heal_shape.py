"""Bench of a healing step at the size of an 8B model: seconds and peak memory.

Random weights of Llama-3-8B's shape.

    python bench/heal_shape.py --out FILE [--layers 32] [--only blocks]

End to end with a resident and with a stored teacher, and block by block with and without codes, as the plan does it on
this GPU and on 24 GB, beside what the plan forecasts; 16 x 512 tokens a step. FILE is rewritten after every row. On a CPU
the widths are tiny: only to try the code.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from heal_lab import DEVICE, peak, phase, reset_peak, save, sync

from requant.data.healing_text import HealingText
from requant.errors import InputError
from requant.heal import student, teacher
from requant.heal.block_streams import from_host
from requant.heal.end_to_end import EndToEndLoss, recompute_in_backward
from requant.heal.model_size import ModelSize
from requant.heal.plan import HealPlan, choose_plan
from requant.heal.settings import HealSettings
from requant.heal.trainer import Trainer
from requant.modeling import skeleton
from requant.modeling.blocks import block_linears, block_list
from requant.numerics.grid import Grid
from requant.numerics.token_errors import relative_error
from requant.runtime.pinned_memory import PinnedBuffer

LAYERS = 32


class Bench:
    """Settings, rows so far, and where they go."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.settings = args, HealSettings(steps=args.steps, batch=args.batch, length=args.window)
        self.seconds: dict[str, float] = {}
        self.rows: list[dict[str, Any]] = []

    def measure(
        self, mode: str, runs: Trainer, micro: int, whole: Callable[[float], float], also: dict[str, Any] | None = None
    ) -> None:
        """Two steps after a first one; `whole` makes the seconds of everything of those of a step."""
        batch = self.settings.batch
        runs.micro_batch = micro
        reset_peak()
        runs.step(0, range(batch))
        sync()
        started = time.perf_counter()
        for i in (1, 2):
            runs.step(i, range(i * batch, (i + 1) * batch))
        sync()
        each = (time.perf_counter() - started) / 2
        row = {"mode": mode, "micro": micro, "seconds_a_step": each, "peak_gb": peak(), "seconds_whole": whole(each)}
        row |= also or {}
        self.rows.append(row)
        print(f"  {row}", flush=True)
        about = {"layers": self.args.layers, "settings": asdict(self.settings)}
        save(self.args.out, about | {"rows": self.rows, "seconds": self.seconds})


class Known:
    """A teacher whose hidden states are at hand."""

    def __init__(self, states: torch.Tensor, head: Any) -> None:
        self.kept, self.head = states, head

    def inputs(self, numbers: Any) -> tuple[torch.Tensor, ...]:
        return (self.kept[list(numbers)].to(DEVICE),)

    def states(self, *inputs: torch.Tensor) -> torch.Tensor:
        return inputs[0]


def end_to_end(bench: Bench, config: Any) -> None:
    """Resident teacher, then the same hidden states from before."""
    s = bench.settings
    windows = torch.randint(0, config.vocab_size, (3 * s.batch, s.length))
    with phase("random student", bench.seconds):
        pupil = random_student(random_model(config, quantized=True))
        student.widen(pupil.model)
        recompute_in_backward(pupil.model)
    with phase("random teacher", bench.seconds):
        big = random_model(config, quantized=False)
        taught = teacher.ResidentTeacher(big, windows, DEVICE)

    def measure(mode: str, source: Any, micro: int, before: float) -> None:
        with phase(f"{mode}, {micro} windows at a time", bench.seconds):
            loss = EndToEndLoss(pupil, source, HealingText(windows, s.batch), DEVICE)
            runs = Trainer(pupil, loss, loss.measure, s, train=2 * s.batch, choosing=s.batch)
            bench.measure(mode, runs, micro, lambda each: before + each * s.steps)

    for micro in (s.batch, max(1, s.batch // 4)):
        measure("resident teacher", taught, micro, 0.0)
    with phase("teacher's forward", bench.seconds):
        sync()
        started = time.perf_counter()
        at = range(0, len(windows), s.batch)
        states = [
            taught.states(*taught.inputs(range(i, i + s.batch))).to(teacher.product_dtype(DEVICE)).cpu() for i in at
        ]
        before = (time.perf_counter() - started) / len(at) * s.steps
    known = Known(torch.cat(states), taught.head)
    del big, taught
    for micro in (s.batch, max(1, s.batch // 4), 1):
        measure("stored teacher", known, micro, before)


def block_by_block(bench: Bench, config: Any) -> None:
    """One block as the plan heals it: with all of the GPU's memory and with 24 GB; scales, and scales and codes."""
    size, device = model_size(config), DEVICE
    batch = bench.settings.batch
    windows = torch.zeros((bench.settings.steps + 2) * batch, bench.settings.length, dtype=torch.int64)
    text = HealingText(windows, batch, batch)
    for tune in (("scales",), ("scales", "codes")):
        for gigabytes in (None, 24):
            settings = replace(bench.settings, tune=tune)
            try:
                plan = choose_plan(
                    size, settings, text, device=device, mode="blocks", free=gigabytes and gigabytes * 10**9
                )
            except InputError as error:
                print(f"  {error}", flush=True)
                continue
            name = f"block by block, {' and '.join(tune)}, {gigabytes or 'all'} GB"
            with phase(name, bench.seconds):
                one_block(bench, config, name, replace(settings, tune=tune), plan)


def one_block(bench: Bench, config: Any, name: str, s: HealSettings, plan: HealPlan) -> None:
    """Steps of one block of the student, with what else is in memory: hidden states and the teacher's next block."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    model = random_model(config, quantized=True)
    rotary = model.model.rotary_emb(
        torch.zeros(1, 1, config.hidden_size, device=DEVICE), torch.arange(s.length, device=DEVICE)[None]
    )
    ours, following = block_list(model)[1][0], block_list(random_model(config, quantized=False))[1][0]
    pupil = random_student(ours, codes=plan.codes)
    del model
    shape = (plan.windows + 2 * s.batch, s.length, config.hidden_size)
    place = torch.device("cpu") if plan.on_host else DEVICE
    few = torch.randn(8, *shape[1:], dtype=teacher.product_dtype(DEVICE), device=place)
    streams = [few.repeat(-(-shape[0] // 8), 1, 1)[: shape[0]].clone() for _ in range(2)]
    buffers = [PinnedBuffer(), PinnedBuffer()]

    def run(block: Any, hidden: torch.Tensor) -> torch.Tensor:
        with teacher.precision(DEVICE):
            out = block(hidden.float(), position_embeddings=rotary)
        return out[0] if isinstance(out, tuple) else out

    def errors(numbers: Any) -> torch.Tensor:
        on_device = [
            from_host(stream, numbers, buffer, DEVICE) if plan.on_host else stream[list(numbers)]
            for stream, buffer in zip(streams, buffers, strict=True)
        ]
        return relative_error(run(ours, on_device[0]), on_device[1])

    def measure(numbers: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = errors(numbers).double().cpu()
        return found, torch.zeros_like(found)

    with torch.no_grad():
        run(following, streams[0][: plan.micro_batch].to(DEVICE))
        sync()
        started = time.perf_counter()
        for part in torch.split(streams[0], plan.micro_batch)[:4]:
            part.copy_(run(following, part.to(DEVICE)))
        sync()
    each_forward = (time.perf_counter() - started) / (4 * plan.micro_batch)
    runs = Trainer(pupil, lambda numbers: errors(numbers).sum(), measure, s, train=plan.windows, choosing=s.batch)
    forwards = 2 * shape[0] + s.batch * len(s.validation_steps())
    bench.measure(
        name, runs, plan.micro_batch, lambda each: bench.args.layers * (each * s.steps + each_forward * forwards),
        {"windows": plan.windows, "on_host": plan.on_host, "codes": plan.codes, "forecast_gb": round(plan.bytes / 1e9, 2),
         "forecast_seconds": round(plan.seconds, 1)},
    )  # fmt: skip


def model_size(config: Any) -> ModelSize:
    """Sizes of the model with 4-bit codes in groups of 128."""
    model: Any = skeleton.build(config)
    prefix, items = block_list(model)
    names = [f"{prefix}.{i}.{name}" for i, block in enumerate(items) for name in block_linears(block)]
    return ModelSize.of(model, dict.fromkeys(names, Grid(4, min(128, config.hidden_size // 2))))


def random_model(config: Any, *, quantized: bool, group: int = 128) -> Any:
    """A model on the device: random 16-bit weights, or random 4-bit codes in groups."""
    model: Any = skeleton.build(config)
    dtype = teacher.product_dtype(DEVICE)
    prefix, items = block_list(model)
    for index, block in enumerate(items if quantized else []):
        for name, linear in block_linears(block).items():
            new = random_linear(linear.out_features, linear.in_features, dtype, group)
            model.set_submodule(f"{prefix}.{index}.{name}", new)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = torch.ones(parameter.shape, device=DEVICE)
            if parameter.ndim > 1:
                value = torch.randn(parameter.shape, device=DEVICE, dtype=dtype) * 0.02
            skeleton.place(model, {name: value})
    model.tie_weights()
    return model.to(DEVICE)


def random_linear(rows: int, columns: int, dtype: torch.dtype, group: int = 128) -> student.ScaledLinear:
    group = min(group, columns // 2)
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=DEVICE)
    scale = torch.full((rows, columns // group), 2.0**-8, device=DEVICE)
    zero = torch.full(scale.shape, 8, dtype=torch.uint8, device=DEVICE)
    return student.ScaledLinear(
        student.Codes(packed=packed, scale=scale, zero=zero, columns=columns, bits=4), None, dtype
    )


def random_student(model: Any, *, codes: bool = False) -> student.Student:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, student.ScaledLinear)}
    scales = student.trainable_scales(layers, teacher.product_dtype(DEVICE))
    latents = [student.train_codes(stem, layer, None) for stem, layer in layers.items()] if codes else []
    return student.Student(model, [scales, *latents])


def main() -> None:
    from transformers import LlamaConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    for name, default in {"layers": LAYERS, "steps": 150, "batch": 16, "window": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", choices=("whole", "blocks"), help="how to heal; without: both")
    bench = Bench(parser.parse_args())
    tiny = DEVICE.type == "cpu"
    config = LlamaConfig(
        hidden_size=64 if tiny else 4096, intermediate_size=128 if tiny else 14336, num_hidden_layers=bench.args.layers,
        num_attention_heads=4 if tiny else 32, num_key_value_heads=2 if tiny else 8, vocab_size=96 if tiny else 128256,
        tie_word_embeddings=False,
    )  # fmt: skip
    if bench.args.only != "blocks":
        end_to_end(bench, config)
        reset_peak()
    if bench.args.only != "whole":
        block_by_block(bench, config)


if __name__ == "__main__":
    main()
