"""Plan of a healing: mode, memory and time, estimated from the model's structure.

whole       end to end; the teacher is resident beside the student, or its hidden states were stored before
blocks      one block at a time towards the merged model's block, for models that do not fit whole
blocks+whole    codes block by block, then all but the codes end to end
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from requant.data.healing_text import HealingText
from requant.errors import InputError
from requant.heal.model_size import ModelSize
from requant.heal.settings import HealSettings
from requant.runtime.device import USABLE, free_bytes, product_rate, profile_of

Mode = Literal["whole", "blocks"]
AskedMode = Literal["auto", "whole", "blocks", "blocks+whole"]
BLOCK_TOKENS, FEWEST_TOKENS = 2**20, 2**17  # block by block: read at most, and whatever the memory of the host
HOST_SHARE = 0.5  # of its free memory for hidden states
CAPTURED = 2**44  # weights times tokens of a forward pass, up to which launches take longer than the kernels
BYTES_PER_LATENT = 4 * 4  # latent, gradient, two moments
BYTES_PER_SCALE = 7 * 4  # base, unit, offset, gradient, two moments, best; and the values in use


@dataclass(frozen=True, slots=True, kw_only=True)
class HealPlan:
    """How a checkpoint is healed on a device, with estimates of memory and time.

    teacher_resident: the teacher stays in memory. recompute: blocks run again in the backward pass.
    micro_batch: windows in one forward pass. codes: whether codes are trained, if asked for. without_codes: why not.
    windows: trained on block by block; 0: all. on_host: hidden states between blocks wait in host memory.
    captured: the steps run as CUDA graphs. then: the plan of a second pass, without codes.
    """

    mode: Mode
    teacher_resident: bool
    recompute: bool
    micro_batch: int
    codes: bool = True
    without_codes: str = ""
    windows: int = 0
    on_host: bool = False
    captured: bool = False
    bytes: int = 0
    seconds: float = 0.0
    then: HealPlan | None = None

    @property
    def name(self) -> str:
        """The mode as a recipe asks for it."""
        return f"{self.mode}+{self.then.mode}" if self.then else self.mode

    @property
    def peak(self) -> int:
        """Peak bytes on the device, of all passes."""
        return max(self.bytes, self.then.bytes if self.then else 0)

    def __str__(self) -> str:
        how = f"end to end, teacher {'beside it' if self.teacher_resident else 'run before it'}"
        if self.mode == "blocks":
            how = f"block by block on {self.windows:,} windows"
        needs = f"about {self.bytes / 1e9:.1f} GB and {max(self.seconds / 60, 0.1):.1f} min"
        after = f"; then without codes {self.then}" if self.then else ""
        return f"{how}, {needs}{self.without_codes}{after}"


def choose_plan(
    size: ModelSize,
    settings: HealSettings,
    text: HealingText,
    *,
    device: torch.device,
    mode: AskedMode = "auto",
    free: int | None = None,
    free_host: int | None = None,
    rate: float | None = None,
) -> HealPlan:
    """The plan that heals most of those that fit in the memory of the device, and of these the fastest.

    free, free_host: bytes of device and host; None: what is free now. rate: flops a second of matrix products; None:
    the device's. Raises InputError when no plan fits.
    """
    on_device = free if free is not None else free_bytes(device)
    on_host = free_host if free_host is not None else free_bytes(torch.device("cpu"))
    estimates = _Estimates(
        size, settings, text, device, (rate or product_rate(device)) * profile_of(device).busy_share, on_host
    )
    tried: list[HealPlan] = []
    for plan in _candidates(settings, mode):
        estimated = estimates.of(plan)
        if estimated.peak <= USABLE * on_device:
            if "codes" in settings.tune and not plan.codes:
                needed = min(other.peak for other in tried if other.codes)
                estimated = replace(estimated, without_codes=f"; codes stay: with them {needed / 1e9:.1f} GB")
            return estimated
        tried.append(estimated)
    least = min(tried, key=lambda plan: plan.peak)
    raise InputError(
        f"healing needs at least {least.peak / 1e9:.1f} GB ({least.name}), {device} has "
        f"{on_device / 1e9:.1f} GB free: lower heal.length, {_or_else(settings, mode)}"
    )


def _or_else(settings: HealSettings, mode: AskedMode) -> str:
    """What else to do where nothing fits."""
    if mode in ("whole", "blocks+whole"):
        return "heal.mode: auto, or set heal: off"
    return "tune scales instead of codes, or set heal: off" if settings.tune == ("codes",) else "or set heal: off"


def _candidates(settings: HealSettings, mode: AskedMode) -> Iterator[HealPlan]:
    """Plans of a mode, from the one that heals most; of those that heal the same, from the fastest to the leanest.

    With codes: end to end; block by block, then the rest end to end; block by block. Then without codes.
    """
    asked, rest = "codes" in settings.tune, settings.tune != ("codes",)
    for codes in ([True] if asked else []) + ([False] if rest else []):
        if mode in ("auto", "whole"):
            yield from _whole(settings, codes=codes)
        if rest and (mode == "blocks+whole" or (mode == "auto" and codes)):
            second = list(_whole(settings, codes=False))
            yield from (replace(first, then=then) for then in second for first in _blocks(settings, codes=codes))
        if mode in ("auto", "blocks"):
            yield from _blocks(settings, codes=codes)


def _whole(settings: HealSettings, *, codes: bool) -> Iterator[HealPlan]:
    micro_batches = _micro_batches(settings)
    for resident in (True, False):
        for recompute in (False, True):
            for micro in micro_batches[: None if recompute else 2]:
                yield HealPlan(
                    mode="whole", teacher_resident=resident, recompute=recompute, micro_batch=micro, codes=codes
                )


def _blocks(settings: HealSettings, *, codes: bool) -> Iterator[HealPlan]:
    for micro in _micro_batches(settings):
        for on_host in (False, True):  # costs less than half the batch: that rebuilds the weights twice as often
            yield HealPlan(
                mode="blocks", teacher_resident=False, recompute=False, micro_batch=micro, codes=codes, on_host=on_host
            )


def _micro_batches(settings: HealSettings) -> list[int]:
    """A batch as equal parts, the largest first."""
    return [settings.batch // k for k in range(1, settings.batch + 1) if settings.batch % k == 0]


@dataclass(frozen=True, slots=True)
class _Estimates:
    """Memory and time of plans. speed: flops a second. free_host: bytes."""

    size: ModelSize
    settings: HealSettings
    text: HealingText
    device: torch.device
    speed: float
    free_host: int

    def of(self, plan: HealPlan) -> HealPlan:
        """The plan with what it takes, and with its number of windows."""
        if plan.mode == "blocks":
            plan = replace(plan, windows=self._windows(plan.micro_batch))
        return replace(
            plan,
            bytes=self._block_bytes(plan) if plan.mode == "blocks" else self._whole_bytes(plan),
            seconds=(self._block_flops(plan) if plan.mode == "blocks" else self._whole_flops(plan)) / self.speed,
            captured=self.device.type == "cuda" and self._captured(plan),
            then=self.of(plan.then) if plan.then else None,
        )

    @property
    def _item(self) -> int:
        """Bytes of a value that products are made of."""
        return 2 if self.device.type == "cuda" else 4

    @property
    def _trained(self) -> int:
        """Tokens that are trained on."""
        return self.settings.steps * self.settings.batch * self.text.length

    @property
    def _validated(self) -> int:
        """Tokens of all validations."""
        return len(self.settings.validation_steps()) * self.text.held_out * self.text.length

    def _windows(self, micro_batch: int) -> int:
        """Training windows whose hidden states are kept; halved until they fit in the host's memory."""
        each = self.text.length * self.size.width * self._item
        tokens = BLOCK_TOKENS
        while tokens > FEWEST_TOKENS and 2 * tokens // self.text.length * each > HOST_SHARE * self.free_host:
            tokens //= 2
        return max(1, min(self.text.train, tokens // self.text.length) // micro_batch) * micro_batch

    def _captured(self, plan: HealPlan) -> bool:
        """Whether a step is worth a CUDA graph."""
        tokens = plan.micro_batch * self.text.length
        return plan.mode == "whole" and not plan.recompute and self.size.quantized * tokens <= CAPTURED

    def _activations(self, plan: HealPlan) -> int:
        """Bytes that one block keeps for its backward pass."""
        return plan.micro_batch * self.text.length * self.size.block.inputs_outputs * (self._item + 4)

    def _rebuilt(self, plan: HealPlan) -> int:
        """Bytes of one linear's rebuilt weights, and of fp32 copies in a step of the latents."""
        return 4 * self.size.largest * self._item + (6 * 4 * self.size.largest if plan.codes else 0)

    def _block_bytes(self, plan: HealPlan) -> int:
        """Peak bytes on the device: that of the largest block, whatever their number."""
        block, item, cuda = self.size.block, self._item, self.device.type == "cuda"
        original = (block.quantized + block.other) * item
        student = block.stored_bytes + block.other * item + BYTES_PER_SCALE * block.scales
        if plan.codes:
            student += BYTES_PER_LATENT * block.quantized + 2 * block.stored_bytes  # and the codes of start and best
        training = student + self._activations(plan) + self._rebuilt(plan) + (original if cuda else 0)  # the next one
        after = self.size.outside * item + 6 * 4 * profile_of(self.device).kl_chunk_logits
        windows = 2 * (plan.windows + self.text.held_out) + self.text.held_out
        waiting = 0 if plan.on_host and cuda else windows * self.text.length * self.size.width * item
        return int(waiting + max(2 * original, training, after))

    def _block_flops(self, plan: HealPlan) -> float:
        kept = (plan.windows + self.text.held_out) * self.text.length
        return 2.0 * self.size.quantized * (3 * self._trained + 3 * kept + self._validated)

    def _whole_bytes(self, plan: HealPlan) -> int:
        """Peak bytes on the device."""
        s, item, block = self.size, self._item, self._activations(plan)
        kept = (
            s.layers * plan.micro_batch * self.text.length * s.width * 4 + block if plan.recompute else s.layers * block
        )
        student = s.stored_bytes + s.other * item + BYTES_PER_SCALE * s.scales
        if plan.codes:
            student += BYTES_PER_LATENT * s.quantized + 2 * s.stored_bytes  # and the codes of start and best step
        teacher = (s.quantized + s.other) * item if plan.teacher_resident else 0
        return int(student + teacher + kept + self._rebuilt(plan) + 6 * 4 * profile_of(self.device).kl_chunk_logits)

    def _whole_flops(self, plan: HealPlan) -> float:
        """Multiplications and additions of the whole healing."""
        head = self.size.vocabulary * self.size.width
        forward = 2 * (self.size.quantized + head)
        unique = len(self.text.windows) * self.text.length
        teacher = (self._trained if plan.teacher_resident else unique) * forward
        student = self._trained * (2 * self.size.quantized * (4 if plan.recompute else 3) + 6 * head)
        return float(teacher + self._validated * forward + student)
