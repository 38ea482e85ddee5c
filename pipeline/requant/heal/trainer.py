"""Healing's training loop: AdamW on a student's offsets, and which step is the best.

Step 0 is among the candidates, so the result is never worse than the start on the windows that choose. The least of
several looks at them is a little too good: other windows, looked at once, judge the step that was chosen. A killed run
resumes from its last saved step with the same numbers.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from requant.checkpoint.atomic_write import read_state
from requant.checkpoint.writer import load_tensors, save_tensors
from requant.data.healing_text import HealingText
from requant.errors import StageError
from requant.heal import kl_loss
from requant.heal.job import Progress
from requant.heal.settings import HealSettings
from requant.heal.student import Student
from requant.heal.teacher import Teacher, head_of, precision, product_dtype
from requant.modeling.blocks import block_list
from requant_eval.scoring.lm_head import HeadTap
from requant_eval.strict_json import parse

log = logging.getLogger(__name__)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW


@dataclass
class LossCurve:
    """The losses of a healing, in nats a token.

    train: of each step's batch. held_out: (steps done, loss on the windows that choose). stopped: why it ended early.
    judged: loss of the start and of the best step on the windows that judge; None without such windows.
    """

    train: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    stopped: str | None = None
    judged: tuple[float, float] | None = None

    @property
    def best(self) -> tuple[int, float]:
        """(steps done, loss) of the lowest held-out loss."""
        return min(self.held_out, key=lambda point: point[1])

    @property
    def gained(self) -> bool:
        """Whether a step was chosen that is better than the start, by the windows that judge where there are some."""
        return self.best[0] > 0 and (self.judged is None or self.judged[1] < self.judged[0])

    def to_json(self) -> str:
        """The curve as text for the metadata of a state file."""
        return json.dumps({"train": self.train, "held": self.held_out, "stopped": self.stopped})

    @classmethod
    def from_json(cls, text: str) -> LossCurve:
        """The curve that `to_json` wrote."""
        stored = parse(text, constants=True)
        held_out = [(int(n), float(v)) for n, v in stored["held"]]
        if not held_out:
            raise ValueError("a curve without a loss on held-out text")
        return cls([float(v) for v in stored["train"]], held_out, stored["stopped"])


def _refuse_start(loss: float) -> None:
    """Raise StageError where the checkpoint's own loss is not finite."""
    if not math.isfinite(loss):
        raise StageError("healing: the checkpoint gives NaN or infinity on the healing text: nothing to start from")


def batches(count: int, settings: HealSettings) -> list[list[int]]:
    """Window numbers of every step; the order of each epoch depends on seed and epoch only."""
    need, order = settings.steps * settings.batch, []
    for epoch in range(-(-need // count)):
        generator = torch.Generator().manual_seed(settings.seed * 1000003 + epoch)
        order += torch.randperm(count, generator=generator).tolist()
    return [order[i * settings.batch : (i + 1) * settings.batch] for i in range(settings.steps)]


class Trainer:
    """Trains the offsets of one student.

    loss(numbers): the sum over these windows of each one's mean loss over tokens.
    """

    def __init__(
        self,
        student: Student,
        loss: Callable[[Sequence[int]], Tensor],
        settings: HealSettings,
        *,
        train: int,
        choosing: int,
        judging: int = 0,
        micro_batch: int | None = None,
    ) -> None:
        """Windows 0 .. train-1 are trained on, the next `choosing` choose a step, the next `judging` judge it.

        micro_batch: windows in one forward pass; None: a whole batch.
        """
        self.student, self.loss, self.settings = student, loss, settings
        self.train, self.choosing = train, range(train, train + choosing)
        self.judging = range(self.choosing.stop, self.choosing.stop + judging)
        self.micro_batch = micro_batch or settings.batch
        self.optimizer = torch.optim.AdamW([v.offset for v in student.trainable], lr=settings.lr)
        self.best = [v.offset.clone() for v in student.trainable]
        self.curve = LossCurve()

    def step(self, number: int, chosen: Sequence[int]) -> float:
        """One optimizer step on the chosen windows; returns the loss before it.

        A loss that is not finite changes nothing.
        """
        for vector in self.student.trainable:
            assert vector.offset.grad is not None
            vector.offset.grad.zero_()
        total = 0.0
        for at in range(0, len(chosen), self.micro_batch):
            loss = self.loss(chosen[at : at + self.micro_batch]) / len(chosen)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if math.isfinite(total):
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.rate(number)
            self.optimizer.step()
            self.student.refresh()
        return total

    @torch.no_grad()
    def loss_of(self, numbers: Sequence[int]) -> float:
        """Mean loss of windows."""
        size = self.micro_batch
        parts = [numbers[i : i + size] for i in range(0, len(numbers), size)]
        return sum(float(self.loss(part)) for part in parts) / len(numbers)

    def validate(self, done: int) -> None:
        """Take the held-out loss after `done` steps, and keep the offsets if it is the lowest."""
        value = self.loss_of(self.choosing)
        if not done:
            _refuse_start(value)
        if not math.isfinite(value):
            self.curve.stopped = f"the KL on held-out text was not finite after {done} steps"
            return
        if done and value < self.curve.best[1]:
            self.best = [v.offset.clone() for v in self.student.trainable]
        self.curve.held_out.append((done, value))

    def run(self, state: Path | None, key: str = "", progress: Progress | None = None) -> LossCurve:
        """Run all steps, resumed from the file `state` if it belongs to `key`.

        The student ends with its best offsets.
        """
        chosen, validated = batches(self.train, self.settings), self.settings.validation_steps()
        begin = self.restore(state, key) if state else 0
        with deterministic(self.best[0].device):
            if not self.curve.held_out:
                self.validate(0)
            for number in range(begin, self.settings.steps):
                loss = self.step(number, chosen[number])
                if not math.isfinite(loss):
                    self.curve.stopped = f"the loss was not finite at step {number + 1}"
                if self.curve.stopped:
                    break
                self.curve.train.append(loss)
                if number + 1 in validated:
                    self.validate(number + 1)
                    if state:
                        self.save(state, key)
                if progress:
                    progress(
                        number + 1, self.settings.steps, f"steps, {self.curve.held_out[-1][1]:.4f} on held-out text"
                    )
            if self.judging:
                self.curve.judged = self._judged([torch.zeros_like(v) for v in self.best]), self._judged(self.best)
                _refuse_start(self.curve.judged[0])
        self._set(self.best)
        return self.curve

    def _judged(self, offsets: Sequence[Tensor]) -> float:
        """The loss with these offsets on the windows that judge."""
        self._set(offsets)
        return self.loss_of(self.judging)

    def _set(self, offsets: Sequence[Tensor]) -> None:
        """Give the student these offsets."""
        for vector, offset in zip(self.student.trainable, offsets, strict=True):
            vector.offset.copy_(offset)
        self.student.refresh()

    def save(self, state: Path, key: str) -> None:
        """Write everything that a killed run needs to resume with the same numbers."""
        tensors: dict[str, Tensor] = {}
        for i, (vector, best) in enumerate(zip(self.student.trainable, self.best, strict=True)):
            moments = self.optimizer.state[vector.offset]
            tensors |= {f"offset.{i}": vector.offset, f"best.{i}": best}
            tensors |= {f"{name}.{i}": moments[name] for name in MOMENTS}
        on_host = {k: v.detach().cpu() for k, v in tensors.items()}
        save_tensors(state, on_host, {"key": key, "curve": self.curve.to_json()})

    def restore(self, state: Path, key: str) -> int:
        """Load the state that `save` wrote for the same key.

        Returns the number of steps done, 0 without such a file, or where it is damaged.
        """
        stored = read_state(state, functools.partial(self._stored, key=key))
        if stored is None:
            return 0
        self.curve, tensors = stored
        for i, vector in enumerate(self.student.trainable):
            vector.offset.copy_(tensors[f"offset.{i}"])
            self.best[i].copy_(tensors[f"best.{i}"])
            self.optimizer.state[vector.offset] = {
                n: tensors[f"{n}.{i}"] if n == "step" else tensors[f"{n}.{i}"].to(vector.offset.device) for n in MOMENTS
            }
        self.student.refresh()
        return len(self.curve.train)

    def _stored(self, state: Path, *, key: str) -> tuple[LossCurve, dict[str, Tensor]] | None:
        """Curve and tensors of a state, whole and of this student; None where it belongs to another key."""
        meta, tensors = load_tensors(state)
        if meta["key"] != key:
            return None
        for i, vector in enumerate(self.student.trainable):
            for name in ("offset", "best", *MOMENTS):
                found = tensors[f"{name}.{i}"]
                if name != "step" and found.shape != vector.offset.shape:
                    raise ValueError(f"{name}.{i} has the shape {tuple(found.shape)}")
        return LossCurve.from_json(meta["curve"]), tensors


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

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        ids = self.windows[list(numbers)].to(self.device)
        teacher = self._teacher_states(numbers)
        with precision(self.device):
            hidden, _ = self.tap.run(self.student.model, ids)
        total = kl_loss.divergence(
            hidden.flatten(0, 1), self.head, teacher.flatten(0, 1), self.teacher.head, product_dtype(self.device)
        )
        return total / ids.shape[1]

    def _teacher_states(self, numbers: Sequence[int]) -> Tensor:
        """The teacher's final hidden states [n, length, width].

        Those of held-out windows come from the cache.
        """
        if not set(numbers) <= set(self.held_out):
            return self.teacher.hidden(numbers)
        if tuple(numbers) not in self.cached:
            self.cached[tuple(numbers)] = self.teacher.hidden(numbers).to(product_dtype(self.device))
        return self.cached[tuple(numbers)]


def recompute_in_backward(model: Any) -> None:
    """Keep only the inputs of the blocks for the backward pass, which runs each block again."""
    for block in block_list(model)[1]:
        block.forward = functools.partial(recompute, block.forward, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Context in which torch uses deterministic algorithms, where the device has them."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
