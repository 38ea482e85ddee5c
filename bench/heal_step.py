"""Bench of the kernels of a healing step: same numbers as torch's, and the time of a step.

    python bench/heal_step.py --out FILE [--shape smollm2|8b] [--layers N] [--steps 4]

First every kernel against its torch reference function and against fp64, at the sizes of both models' linears, for all
widths of codes; ends with 1 where one differs by more than a sum in another order does. Then steps of scales and codes of
a random model (16 x 512 tokens, teacher beside it, CUDA graphs on a GPU) with torch's functions, with the kernels of codes,
and with those of codes and KL: seconds, peak memory, what the GPU did by kernel, and by operation and shape. FILE is
rewritten after every part. On a CPU the widths are tiny: only to try the code.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from heal_lab import DEVICE, peak, phase, reset_peak, save, sync
from heal_shape import random_model

from requant.data.healing_text import HealingText
from requant.heal import codes as codes_module
from requant.heal import kl_loss, student, teacher
from requant.heal.captured_steps import CapturedSteps
from requant.heal.codes import Codes
from requant.heal.end_to_end import EndToEndLoss
from requant.heal.settings import HealSettings
from requant.heal.trainer import Trainer
from requant.numerics import triton_kernels

PATHS = {"torch": (False, False), "codes": (True, False), "codes and KL": (True, True)}
SHAPES = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "tie_word_embeddings": True,
}  # fmt: skip
SIZES = [(576, 576, 64), (192, 576, 576), (576, 1536, 96), (4096, 14336, 128), (1024, 4096, 4096)]  # and group
FAMILIES = {
    "products": r"gemm|cutlass|nvjet|xmma|cublas",
    "attention": r"flash|fmha|attention|sdpa",
    "codes": r"_by_group|_round_latent",
    "KL": r"_divergence|[Ss]oft[Mm]ax",
    "optimizer": r"[Aa]dam|multi_tensor",
    "sums": r"reduce",
    "elementwise and copies": r"elementwise|Memcpy|Memset|copy|Cat",
}


@contextmanager
def kernels(*, of_codes: bool, of_kl: bool) -> Iterator[None]:
    """Context in which healing uses its kernels, where they can run, or torch's functions."""
    for module, wanted in ((codes_module, of_codes), (kl_loss, of_kl)):
        usable = triton_kernels.usable if wanted else lambda _: False
        module.triton_kernels = SimpleNamespace(usable=usable)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in (codes_module, kl_loss):
            module.triton_kernels = triton_kernels  # type: ignore[attr-defined]


# --- the same numbers ---


def compare() -> tuple[list[dict[str, Any]], bool]:
    """Rows of every size and width, and whether all are as they should be."""
    rows = []
    for bits in (2, 3, 4, 8):
        for height, columns, group in SIZES if DEVICE.type == "cuda" else [(12, 96, 48)]:
            rows.append(compare_linear(bits, height, columns, group))
    rows.append(compare_kl(2048 if DEVICE.type == "cuda" else 8, 49152 if DEVICE.type == "cuda" else 500))
    for row in rows:
        print(f"  {row}", flush=True)
    return rows, all(row["as it should be"] for row in rows)


def compare_linear(bits: int, rows: int, columns: int, group: int) -> dict[str, Any]:
    """Weight, latents and packed codes bit for bit; gradients of scales at most as far from fp64 as torch's."""
    torch.manual_seed(bits)
    dtype, g_idx = teacher.product_dtype(DEVICE), torch.arange(columns, device=DEVICE) // group
    g_idx = g_idx[torch.randperm(columns, device=DEVICE)] if bits == 3 else g_idx
    codes = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, device=DEVICE)
    scale = (torch.randn(rows, columns // group, device=DEVICE) * 0.01).bfloat16().float()
    zero = torch.randint(0, 2**bits, scale.shape, device=DEVICE)
    x, outer = torch.randn(1024, columns, device=DEVICE), torch.randn(1024, rows, device=DEVICE)
    moved = codes.float() + torch.randn(rows, columns, device=DEVICE)
    found = []
    for wanted in (False, True):
        stored = Codes.of(codes.clone(), scale, zero, g_idx, bits=bits, where="random")
        layer = student.ScaledLinear(stored, None, dtype)
        scales, trained = student.trainable_scales({"x": layer}, dtype), student.train_codes("x", layer, None)
        given = x.clone().requires_grad_()
        with kernels(of_codes=wanted, of_kl=False):
            layer(given).backward(outer.to(dtype))
            weight = stored.weight(layer.current_scales)
            centred = stored.centred(torch.float64)
            with torch.no_grad():
                trained.offset.copy_(moved)
            trained.refresh()
        found.append(
            (weight, given.grad, trained.offset.grad, stored.packed, trained.offset.detach(), scales.offset.grad)
        )
    order = torch.arange(columns, device=DEVICE) if stored.order is None else stored.order
    flat = (outer.to(dtype).T @ x.index_select(1, order).to(dtype)).double()
    exact = (flat.view(*scale.shape, -1) * centred).sum(-1) * scale.double()
    errors = [float((gradients[-1].view(scale.shape) - exact).norm() / exact.norm()) for gradients in found]
    same = [torch.equal(a, b) for a, b in zip(found[0][:-1], found[1][:-1], strict=True)]
    return {
        "bits": bits, "size": [rows, columns, group], "identical": sum(same), "of": len(same),
        "error of scales, torch": errors[0], "error of scales, kernels": errors[1],
        "as it should be": all(same) and errors[1] <= 1.1 * errors[0] + 1e-6,
    }  # fmt: skip


def compare_kl(rows: int, vocab: int) -> dict[str, Any]:
    """Value and gradient of both, each against fp64."""
    torch.manual_seed(0)
    logits = 4 * torch.randn(rows, vocab, device=DEVICE)
    moved = logits + 0.05 * torch.randn(rows, vocab, device=DEVICE)
    log_q, log_p = moved.double().log_softmax(-1), logits.double().log_softmax(-1)
    wanted = log_q.exp() - log_p.exp()
    value = float((log_p.exp() * (log_p - log_q)).sum())
    errors = []
    for use in (False, True):
        gradient = torch.empty_like(logits, dtype=teacher.product_dtype(DEVICE))
        with kernels(of_codes=False, of_kl=use):
            found = kl_loss._by_logits(kl_loss.Head(logits[:0]), moved.clone(), logits.clone(), gradient)
        errors.append((abs(float(found) / value - 1), float((gradient.double() - wanted).norm() / wanted.norm())))
    return {
        "rows": rows, "vocabulary": vocab, "error of KL, torch": errors[0][0], "error of KL, kernel": errors[1][0],
        "error of its gradient, torch": errors[0][1], "error of its gradient, kernel": errors[1][1],
        "as it should be": errors[1][0] < 1e-5 and errors[1][1] <= 1.1 * errors[0][1] + 1e-4,
    }  # fmt: skip


# --- the time ---


def trainer_of(config: Any, settings: HealSettings, group: int, *, captured: bool) -> Trainer:
    """Scales and codes of a random student, towards a random teacher beside it."""
    torch.manual_seed(0)
    model = random_model(config, quantized=True, group=group)
    student.widen(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, student.ScaledLinear)}
    scales = student.trainable_scales(layers, teacher.product_dtype(DEVICE))
    pupil = student.Student(model, [scales, *(student.train_codes(n, m, None) for n, m in layers.items())])
    windows = torch.randint(0, config.vocab_size, (3 * settings.batch, settings.length))
    taught = teacher.ResidentTeacher(random_model(config, quantized=False), windows, DEVICE)
    loss = EndToEndLoss(pupil, taught, HealingText(windows, settings.batch), DEVICE)
    steps = CapturedSteps(loss) if captured and DEVICE.type == "cuda" else None
    return Trainer(
        pupil, loss, loss.measure, settings, train=2 * settings.batch, choosing=settings.batch, captured=steps
    )


def timed(trained: Trainer, steps: int) -> dict[str, Any]:
    """Seconds a step after the first one, losses, peak memory."""
    batch = range(trained.settings.batch)
    reset_peak()
    losses = [trained.step(0, batch)]
    sync()
    started = time.perf_counter()
    losses += [trained.step(i, batch) for i in range(1, steps + 1)]
    sync()
    return {"seconds_a_step": (time.perf_counter() - started) / steps, "losses": losses, "peak_gb": peak()}


def by_kernel(trained: Trainer) -> dict[str, Any]:
    """Milliseconds and launches of one step on the GPU by family, and the kernels that take longest."""
    batch = range(trained.settings.batch)
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        trained.step(1, batch)
        sync()
    milliseconds, launches, single = Counter[str](), Counter[str](), Counter[str]()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            taken = event.time_range.elapsed_us() / 1e3
            family = next((n for n, pattern in FAMILIES.items() if re.search(pattern, event.name)), "other")
            milliseconds[family] += taken
            launches[family] += 1
            single[event.name[:100]] += taken
    return {
        "milliseconds": dict(milliseconds.most_common()),
        "launches": dict(launches),
        "all": sum(milliseconds.values()),
        "longest": dict(single.most_common(20)),
    }


def by_operation(trained: Trainer) -> list[tuple[str, str, int, float]]:
    """Operation, shapes, calls and milliseconds on the GPU of one step that is launched kernel by kernel."""
    batch = range(trained.settings.batch)
    trained.step(0, batch)
    with torch.profiler.profile(record_shapes=True) as profile:
        trained.step(1, batch)
        sync()
    events = profile.key_averages(group_by_input_shape=True)
    rows = [(e.key[:60], str(e.input_shapes)[:90], e.count, e.self_device_time_total / 1e3) for e in events]
    return sorted(rows, key=lambda row: -row[3])[:40]


def main() -> None:
    from transformers import LlamaConfig

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2")
    for name, default in {"layers": 0, "steps": 4, "batch": 16, "window": 512}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    asked = SHAPES[args.shape] if DEVICE.type == "cuda" else TINY
    config = LlamaConfig(**asked | ({"num_hidden_layers": args.layers} if args.layers else {}))
    settings = HealSettings(steps=100, batch=args.batch, length=args.window, tune=("scales", "codes"))
    seconds: dict[str, float] = {}
    with phase("the same numbers", seconds):
        same, passed = compare()
    result: dict[str, Any] = {"shape": args.shape, "seconds": seconds, "same": same, "steps": {}}
    for name, (of_codes, of_kl) in PATHS.items():
        with phase(name, seconds), kernels(of_codes=of_codes, of_kl=of_kl):
            trained = trainer_of(config, settings, 64 if args.shape == "smollm2" else 128, captured=True)
            row = timed(trained, args.steps)
            row["by kernel"] = by_kernel(trained)
            del trained
            reset_peak()
        result["steps"][name] = row
        print(f"  {name}: {row}", flush=True)
        save(args.out, result)
    with phase("by operation", seconds), kernels(of_codes=True, of_kl=True):
        trained = trainer_of(config, settings, 64 if args.shape == "smollm2" else 128, captured=False)
        result["by operation"] = by_operation(trained)
    for line in result["by operation"]:
        print(f"  {line}", flush=True)
    save(args.out, result)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
