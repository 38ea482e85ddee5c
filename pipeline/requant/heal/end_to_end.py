"""The loss of a whole student, and what held-out windows say of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from requant.data.healing_text import HealingText
from requant.heal import kl_loss
from requant.heal.student import Student
from requant.heal.teacher import Teacher, head_of, precision, product_dtype
from requant.modeling.blocks import block_list
from requant_eval.scoring.lm_head import HeadTap


class EndToEndLoss:
    """The loss of a whole student: KL(teacher || student) over the healing windows.

    All positions count. The teacher's hidden states of the held-out windows are cached: every validation uses them.
    """

    def __init__(self, student: Student, teacher: Teacher, text: HealingText, device: torch.device) -> None:
        self.student, self.teacher, self.windows, self.device = student, teacher, text.windows, device
        self.held_out = range(text.train, len(text.windows))
        self.cached: dict[tuple[int, ...], Tensor] = {}
        self.tap = HeadTap(student.model)
        self.head = head_of(student.model, text.windows[:1].to(device))

    def inputs(self, numbers: Sequence[int]) -> tuple[Tensor, ...]:
        """Token ids int64 [n, length] of windows, and the teacher's inputs."""
        return (self.windows[list(numbers)].to(self.device), *self.teacher.inputs(numbers))

    def of(self, ids: Tensor, *teacher_inputs: Tensor) -> Tensor:
        """The sum over windows of each one's mean KL, from their `inputs`."""
        hidden, teacher = self._student_states(ids), self.teacher.states(*teacher_inputs)
        total = kl_loss.divergence(
            hidden.flatten(0, 1), self.head, teacher.flatten(0, 1), self.teacher.head, product_dtype(self.device)
        )
        return total / ids.shape[1]

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        return self.of(*self.inputs(numbers))

    @torch.no_grad()
    def measure(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """KL, and how much more the text costs than with the teacher, of each window: float64 [n] on the CPU."""
        ids, teacher = self.windows[list(numbers)].to(self.device), self._teacher_states(numbers)
        hidden = self._student_states(ids)
        return kl_loss.measured(hidden, self.head, teacher, self.teacher.head, ids, product_dtype(self.device))

    def _student_states(self, ids: Tensor) -> Tensor:
        """The student's final hidden states [n, length, width]."""
        with precision(self.device):
            return self.tap.run(self.student.model, ids)[0]

    def _teacher_states(self, numbers: Sequence[int]) -> Tensor:
        """The teacher's final hidden states [n, length, width].

        Those of held-out windows come from the cache.
        """
        if not set(numbers) <= set(self.held_out):
            return self.teacher.states(*self.teacher.inputs(numbers))
        if tuple(numbers) not in self.cached:
            states = self.teacher.states(*self.teacher.inputs(numbers))
            self.cached[tuple(numbers)] = states.to(product_dtype(self.device))
        return self.cached[tuple(numbers)]


def recompute_in_backward(model: Any) -> None:
    """Keep only the inputs of the blocks for the backward pass, which runs each block again."""
    for block in block_list(model)[1]:
        block.forward = functools.partial(recompute, block.forward, use_reentrant=False, preserve_rng_state=False)
