"""Plan of a healing: mode, memory and time, estimated from the model's structure.

whole       end to end; the teacher is resident beside the student, or its hidden states were stored before
blocks      one block at a time towards the merged model's block, for models that do not fit whole
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from requant.data.healing_text import HealingText
from requant.errors import InputError
from requant.heal.settings import HealSettings
from requant.modeling.blocks import block_linears, block_list, kinds
from requant.numerics.grid import Grid
from requant.runtime.device import USABLE, free_bytes, product_rate, profile_of

Mode = Literal["whole", "blocks"]
BLOCK_WINDOWS = 256  # block by block the hidden states of all windows are kept: more do not fit for large models
CAPTURED = 2**44  # weights times tokens of a forward pass, up to which launches take longer than the kernels
BYTES_PER_LATENT = 4 * 4  # latent, gradient, two moments
BYTES_PER_SCALE = 7 * 4  # base, unit, offset, gradient, two moments, best; and the values in use


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """The sizes of a model that memory and time depend on.

    inputs_outputs: sum of the widths of a block's linears.
    """

    quantized: int  # weights
    stored_bytes: int  # of their codes
    scales: int
    other: int  # parameters left in 16 bit
    largest: int  # weights of the largest quantized linear
    layers: int
    width: int
    vocabulary: int
    inputs_outputs: int

    @classmethod
    def of(cls, model: nn.Module, grids: Mapping[str, Grid]) -> ModelSize:
        """From a skeleton and the grid of every quantized linear."""
        linears: dict[str, Any] = {name: model.get_submodule(name) for name in grids}
        sizes = {name: m.weight.numel() for name, m in linears.items()}
        items = block_list(model)[1]
        inside = [block_linears(block).values() for block in kinds(items)]
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        return cls(
            quantized=sum(sizes.values()),
            stored_bytes=sum(n if grids[name].bits == 8 else n // 2 for name, n in sizes.items()),
            scales=sum(m.out_features * grids[name].groups(m.in_features) for name, m in linears.items()),
            other=sum(p.numel() for p in model.parameters()) - sum(sizes.values()),
            largest=max(sizes.values()),
            layers=len(items),
            width=embedding.embedding_dim,
            vocabulary=embedding.num_embeddings,
            inputs_outputs=max(sum(m.in_features + m.out_features for m in linears) for linears in inside),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HealPlan:
    """How a checkpoint is healed on a device, with estimates of memory and time.

    teacher_resident: the teacher stays in memory. recompute: blocks run again in the backward pass.
    micro_batch: windows in one forward pass. codes: whether codes are trained, if asked for. without_codes: why not.
    captured: the steps run as CUDA graphs.
    """

    mode: Mode
    teacher_resident: bool
    recompute: bool
    micro_batch: int
    codes: bool = True
    without_codes: str = ""
    captured: bool = False
    bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        how = {"whole": "end to end", "blocks": "block by block"}[self.mode]
        teacher = ""
        if self.mode == "whole":
            teacher = f", teacher {'beside it' if self.teacher_resident else 'run before it'}"
        needs = f"about {self.bytes / 1e9:.1f} GB and {max(self.seconds / 60, 0.1):.1f} min"
        return f"{how}{teacher}, {needs}{self.without_codes}"


def choose_plan(
    size: ModelSize,
    settings: HealSettings,
    text: HealingText,
    *,
    device: torch.device,
    mode: Mode | Literal["auto"] = "auto",
    free: int | None = None,
    rate: float | None = None,
) -> HealPlan:
    """The fastest plan that fits in the memory of the device.

    free: bytes; None: the free bytes of the device now. rate: flops a second of matrix products; None: the device's.
    Raises InputError when no plan fits.
    """
    memory_share = USABLE * (free if free is not None else free_bytes(device))
    speed = (rate or product_rate(device)) * profile_of(device).busy_share
    unique, length = len(text.windows), text.length
    tokens = Tokens(
        trained=settings.steps * settings.batch * length,
        unique=unique * length,
        validated=len(settings.validation_steps()) * text.held_out * length,
    )
    tried: list[HealPlan] = []
    for plan in _candidates(settings):
        if mode not in ("auto", plan.mode):
            continue
        estimated = replace(
            plan, bytes=_memory(size, plan, length, unique, device), seconds=_flops(size, plan, tokens) / speed,
            captured=device.type == "cuda" and _captured(size, plan, length),
        )  # fmt: skip
        if estimated.bytes <= memory_share:
            if "codes" in settings.tune and not plan.codes:
                needed = min((other.bytes for other in tried if other.codes), default=0)
                why = f"with them {needed / 1e9:.1f} GB" if needed else "they are trained end to end only"
                estimated = replace(estimated, without_codes=f"; codes stay: {why}")
            return estimated
        tried.append(estimated)
    least = min(tried, key=lambda plan: plan.bytes)
    raise InputError(
        f"healing needs at least {least.bytes / 1e9:.1f} GB ({least.mode}), {device} has "
        f"{memory_share / USABLE / 1e9:.1f} GB free: lower heal.length, {_or_else(settings)}"
    )


def _or_else(settings: HealSettings) -> str:
    """What else to do where nothing fits."""
    return "tune scales instead of codes, or set heal: off" if settings.tune == ("codes",) else "or set heal: off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Numbers of tokens: trained on, read at all, and in all validations together."""

    trained: int
    unique: int
    validated: int


def _candidates(settings: HealSettings) -> list[HealPlan]:
    """All plans, from the fastest to the one with the least memory; those with codes, if asked for, come first.

    Codes are trained end to end only.
    """
    batch = settings.batch
    micro_batches = [batch // k for k in range(1, batch + 1) if batch % k == 0]
    asked = "codes" in settings.tune
    whole = [
        HealPlan(mode="whole", teacher_resident=resident, recompute=recompute, micro_batch=micro, codes=codes)
        for codes in ((True, False) if asked else (False,))
        for resident in (True, False)
        for recompute in (False, True)
        for micro in micro_batches[: None if recompute else 2]
    ]
    if settings.tune == ("codes",):
        return [plan for plan in whole if plan.codes]
    return whole + [
        HealPlan(mode="blocks", teacher_resident=False, recompute=False, micro_batch=micro, codes=False)
        for micro in micro_batches
    ]


def _captured(s: ModelSize, plan: HealPlan, length: int) -> bool:
    """Whether a step is worth a CUDA graph."""
    return plan.mode == "whole" and not plan.recompute and s.quantized * plan.micro_batch * length <= CAPTURED


def _memory(s: ModelSize, plan: HealPlan, length: int, unique: int, device: torch.device) -> int:
    """Peak bytes on the device."""
    item = 2 if device.type == "cuda" else 4
    tokens = plan.micro_batch * length
    block = tokens * s.inputs_outputs * (item + 4)  # kept by one block for its backward pass
    rebuilt = 4 * s.largest * item + (6 * 4 * s.largest if plan.codes else 0)  # fp32 copies in a step of the latents
    if plan.mode == "blocks":
        one = (s.quantized * item + s.stored_bytes) // s.layers
        streams = 3 * min(unique, BLOCK_WINDOWS) * length * s.width * item
        return int(one + block + rebuilt + BYTES_PER_SCALE * s.scales // s.layers + streams + s.other * item)
    kept = s.layers * tokens * s.width * 4 + block if plan.recompute else s.layers * block
    student = s.stored_bytes + s.other * item + BYTES_PER_SCALE * s.scales
    if plan.codes:
        student += BYTES_PER_LATENT * s.quantized + 2 * s.stored_bytes  # and the codes of start and best step
    teacher = (s.quantized + s.other) * item if plan.teacher_resident else 0
    return int(student + teacher + kept + rebuilt + 6 * 4 * profile_of(device).kl_chunk_logits)


def _flops(s: ModelSize, plan: HealPlan, tokens: Tokens) -> float:
    """Multiplications and additions of the whole healing."""
    forward = 2 * (s.quantized + s.vocabulary * s.width)
    if plan.mode == "blocks":
        return 2.0 * s.quantized * (3 * tokens.trained + 3 * tokens.unique + tokens.validated)
    teacher = (tokens.trained if plan.teacher_resident else tokens.unique) * forward
    passes = 4 if plan.recompute else 3
    student = tokens.trained * (2 * s.quantized * passes + 6 * s.vocabulary * s.width)
    return float(teacher + tokens.validated * forward + student)
