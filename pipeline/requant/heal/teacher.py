"""The teacher: the 16-bit model's final hidden states on the healing text, and its LM head.

A resident teacher runs beside the student. A stored one ran before, and its hidden states are on disk. Logits are
computed again from hidden states and head: they are the same, and 32 to 85 times larger.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from requant.errors import StageError
from requant.heal import student
from requant.heal.job import Progress
from requant.runtime.device import compute_dtype
from requant_eval.errors import EvaluationError
from requant_eval.scoring.lm_head import Head, HeadTap, prove_head
from requant_eval.scoring.reference_states import Reference, ReferenceWriter


def precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of a forward pass: products in bfloat16 on a GPU, fp32 on a CPU."""
    dtype = product_dtype(device)
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def product_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which weights are multiplied: bfloat16 on a GPU, fp32 on a CPU."""
    return compute_dtype(device, torch.bfloat16)


class _RoundedTap(HeadTap):
    """Hidden states in the dtype of the head's product.

    The tolerance of `prove_head` depends on the dtype.
    """

    def run(self, model: Any, ids: Tensor, keep: int = 1) -> tuple[Tensor, Tensor]:
        hidden, out = super().run(model, ids, keep)
        return hidden.to(product_dtype(ids.device)), out


@torch.no_grad()
def head_of(model: Any, ids: Tensor) -> Head:
    """The model's LM head in the product's dtype.

    ids: int64 [1, length]; the head is proved on its first positions.
    """
    try:
        with precision(ids.device):
            head = prove_head(model, _RoundedTap(model), ids)
        return replace(head, weight=head.weight.to(product_dtype(ids.device)))
    except EvaluationError as error:
        raise StageError(f"healing: {error}") from error


class Teacher(Protocol):
    """Final hidden states of windows, and the LM head, on the student's device."""

    head: Head

    def inputs(self, numbers: Sequence[int]) -> tuple[Tensor, ...]:
        """What the states of these windows are made of, on the device."""
        ...

    def states(self, *inputs: Tensor) -> Tensor:
        """Final hidden states [n, length, width] from `inputs`."""
        ...


class ResidentTeacher:
    """A teacher that stays in memory beside the student; windows int64 [n, length]."""

    def __init__(self, model: Any, windows: Tensor, device: torch.device) -> None:
        self.model, self.windows, self.device = model, windows, device
        student.widen(model)
        self.tap = HeadTap(model)
        self.head = head_of(model, windows[:1].to(device))

    def inputs(self, numbers: Sequence[int]) -> tuple[Tensor, ...]:
        return (self.windows[list(numbers)].to(self.device),)

    @torch.no_grad()
    def states(self, *inputs: Tensor) -> Tensor:
        with precision(self.device):
            return self.tap.run(self.model, inputs[0])[0]


class StoredTeacher:
    """A teacher whose hidden states were written by `store_teacher`."""

    def __init__(self, file: Path, *, length: int, digest: str, device: torch.device) -> None:
        try:
            self.reference = Reference(file, digest=digest, device=device)
        except EvaluationError as error:
            raise StageError(f"healing: {error}") from error
        self.head, self.length = self.reference.head, length

    def inputs(self, numbers: Sequence[int]) -> tuple[Tensor, ...]:
        return (torch.stack([self.reference.hidden(i * self.length, (i + 1) * self.length) for i in numbers]),)

    def states(self, *inputs: Tensor) -> Tensor:
        return inputs[0]


def store_teacher(
    teacher: ResidentTeacher, file: Path, *, digest: str, batch: int, progress: Progress | None = None
) -> None:
    """Write a teacher's hidden states of all windows, in 16 bit (fp32 on a CPU).

    `file` appears when complete.
    """
    count, length = teacher.windows.shape
    dtype = product_dtype(teacher.device)
    like = teacher.states(*teacher.inputs([0])).to(dtype)
    with ReferenceWriter(file, rows=count * length, like=like, head=teacher.head, digest=digest) as writer:
        for at in range(0, count, batch):
            numbers = range(at, min(at + batch, count))
            writer.write(at * length, teacher.states(*teacher.inputs(numbers)).to(dtype))
            if progress:
                progress(numbers.stop, count, "windows of the teacher's hidden states")
