"""Healing's training loop: AdamW on offsets and latents, and which step is the best.

Step 0 is among the candidates, so the result is never worse than the start on the windows that choose. The least of
several looks at them is a little too good: other windows, looked at once, judge the step that was chosen. A killed run
resumes from its last saved step with the same numbers.
"""

from __future__ import annotations

import functools
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from requant.checkpoint.atomic_write import read_state
from requant.checkpoint.writer import load_tensors, save_tensors
from requant.errors import StageError
from requant.heal.captured_steps import CapturedSteps
from requant.heal.curve import Judgement, Look, LossCurve, Windows
from requant.heal.job import Progress
from requant.heal.settings import HealSettings
from requant.heal.student import Student
from requant.heal.trainable import Trainable
from requant.runtime.ranks import SINGLE_PROCESS, Ranks

log = logging.getLogger(__name__)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW
SMALL_STATE = 2**28  # bytes: a state up to that is saved after every look at held-out text
STATE_BYTES_A_SECOND = 2**28  # written and synced to a plain disk
SAVING_SHARE = 0.05  # of the time that training takes


def _refuse_start(look: Look) -> None:
    """Raise StageError where the checkpoint's own losses are not finite."""
    if not look.finite:
        raise StageError("healing: the checkpoint gives NaN or infinity on the healing text: nothing to start from")


def batches(count: int, settings: HealSettings) -> list[list[int]]:
    """Window numbers of every step; the order of each epoch depends on seed and epoch only."""
    need, order = settings.steps * settings.batch, []
    for epoch in range(-(-need // count)):
        generator = torch.Generator().manual_seed(settings.seed * 1000003 + epoch)
        order += torch.randperm(count, generator=generator).tolist()
    return [order[i * settings.batch : (i + 1) * settings.batch] for i in range(settings.steps)]


Measure = Callable[[Sequence[int]], tuple[Tensor, Tensor]]


def rate_groups(student: Student, settings: HealSettings) -> list[dict[str, Any]]:
    """An optimizer's groups of values and of codes. `peak` is the highest rate of each; codes are not drawn to zero."""
    groups: list[dict[str, Any]] = []
    for unit, peak, decay in (("value", settings.lr, 0.01), ("code", settings.code_lr, 0.0)):
        found = [v.offset for v in student.trainable if v.unit_of_rate == unit]
        groups += [{"params": found, "peak": peak, "weight_decay": decay}] if found else []
    return groups


def adamw(student: Student, settings: HealSettings) -> torch.optim.Optimizer:
    """AdamW on all trainable values: one kernel for all of them on a GPU, without copies of all latents at once."""
    groups = rate_groups(student, settings)
    on_gpu = student.trainable[0].offset.device.type == "cuda"
    return torch.optim.AdamW(groups, lr=settings.lr, foreach=False, fused=on_gpu)


class Trainer:
    """Trains the offsets of one student.

    loss(numbers): the sum over these windows of each one's mean loss over tokens. measure(numbers): KL and loss of each
    of these windows, float64 [n] on the CPU.
    """

    def __init__(
        self,
        student: Student,
        loss: Callable[[Sequence[int]], Tensor],
        measure: Measure,
        settings: HealSettings,
        *,
        train: int,
        choosing: int,
        judging: int = 0,
        sources: Sequence[int] = (),
        micro_batch: int | None = None,
        captured: CapturedSteps | None = None,
        ranks: Ranks = SINGLE_PROCESS,
    ) -> None:
        """Windows 0 .. train-1 are trained on, the next `choosing` choose a step, the next `judging` judge it.

        sources: the source of each of the latter; without: one. micro_batch: windows in one forward pass; None: a
        whole batch. captured: of the same loss and student, where the steps run as CUDA graphs. ranks: share the
        windows of every step and of every look; each makes the same steps of its own student.
        """
        self.student, self.loss, self.measure, self.settings = student, loss, measure, settings
        self.train, self.choosing = train, range(train, train + choosing)
        self.judging = range(self.choosing.stop, self.choosing.stop + judging)
        self.sources = tuple(sources) or (0,) * (choosing + judging)
        self.micro_batch = micro_batch or settings.batch
        self.captured, self.ranks = captured, ranks
        self._saved_at = time.monotonic()
        self.optimizer = adamw(student, settings)
        self.best = [v.start() for v in student.trainable]
        self.curve = LossCurve()

    def step(self, number: int, chosen: Sequence[int]) -> float:
        """One optimizer step on the chosen windows; returns the loss before it.

        A loss that is not finite changes nothing.
        """
        self.optimizer.zero_grad(set_to_none=False)
        own, total = chosen[self.ranks.share(len(chosen))], 0.0
        for at in range(0, len(own), self.micro_batch):
            total += self._add_gradient(own[at : at + self.micro_batch], len(chosen))
        (total,) = self.ranks.sum([total])
        self.ranks.all_reduce((), [v.offset.grad for v in self.student.trainable if v.offset.grad is not None], (0,))
        if math.isfinite(total):
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * self.settings.share_of_rate(number)
            self.optimizer.step()
            (self.captured or self.student).refresh()
        return total

    def _add_gradient(self, numbers: Sequence[int], count: int) -> float:
        """Add the gradient of the loss of these of `count` windows; returns their share of the loss."""
        if self.captured:
            return self.captured.add_gradient(numbers, count)
        loss = self.loss(numbers) / count
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    @torch.no_grad()
    def look(self, numbers: range) -> Windows:
        """KL and loss of held-out windows."""
        own, size = numbers[self.ranks.share(len(numbers))], self.micro_batch
        parts = [self.measure(own[i : i + size]) for i in range(0, len(own), size)]
        every = [part for of_rank in self.ranks.all_gather_objects(parts) for part in of_rank]
        kl, loss = (torch.cat(each) for each in zip(*every, strict=True))
        return Windows(kl, loss, [self.sources[n - self.train] for n in numbers])

    def validate(self, done: int) -> None:
        """Look at the windows that choose after `done` steps, and keep the values if their score is the least."""
        found = Look(done, self.look(self.choosing))
        if not done:
            _refuse_start(found)
        if not found.finite:
            self.curve.stopped = f"the KL on held-out text was not finite after {done} steps"
            return
        self.curve.held_out.append(found)
        if done and self.curve.best is found:
            self.best = [v.snapshot() for v in self.student.trainable]
        if done < self.settings.steps and self.curve.turned(self.settings.steps):
            self.curve.stopped = f"held-out text has only become worse since step {self.curve.best.steps}"

    def run(self, state: Path | None, key: str = "", progress: Progress | None = None) -> LossCurve:
        """Run all steps, resumed from the file `state` if it belongs to `key`.

        The student ends with its best values.
        """
        begin = self._begin(state, key)
        with deterministic(self.student.trainable[0].offset.device):
            if not self.curve.held_out:
                self.validate(0)
            self._steps(begin, state, key, progress)
            if self.judging:
                start, chosen = (self._judged(v) for v in ([v.start() for v in self.student.trainable], self.best))
                self.curve.judged = Judgement.of(start, chosen, self.curve.best.steps)
                _refuse_start(self.curve.judged.start)
        self._set(self.best)
        return self.curve

    def _begin(self, state: Path | None, key: str) -> int:
        """The number of steps that are done: the first rank restores them, all ranks go on from its values."""
        begin = self.restore(state, key) if state and self.ranks.first else 0
        begin, curve = self.ranks.broadcast((begin, self.curve.to_json() if begin else ""))
        if begin and not self.ranks.first:
            self.curve = LossCurve.from_json(curve)
            for vector in self.student.trainable:
                moments = {n: torch.empty_like(vector.offset) for n in MOMENTS[1:]}
                self._put_moments(vector, torch.tensor(float(begin)), moments)
        for i, vector in enumerate(self.student.trainable):
            moved = [self.optimizer.state[vector.offset][n] for n in MOMENTS[1:]] if begin else []
            for tensor in (vector.offset, self.best[i], *moved):
                self.ranks.broadcast_tensor(tensor)
        if self.ranks.count > 1:
            self.student.refresh()
        return begin

    def _put_moments(self, vector: Trainable, step: Tensor, moments: Mapping[str, Tensor]) -> None:
        """Give the optimizer what it knows of a vector."""
        on_device = self.optimizer.defaults.get("fused")
        self.optimizer.state[vector.offset] = {MOMENTS[0]: step.to(vector.offset.device) if on_device else step} | {
            name: moments[name] for name in MOMENTS[1:]
        }

    def _steps(self, begin: int, state: Path | None, key: str, progress: Progress | None) -> None:
        """The steps from `begin` on, with looks at held-out text, until all are done or the curve says why not."""
        chosen, validated = batches(self.train, self.settings), self.settings.validation_steps()
        for number in range(begin, self.settings.steps):
            if self.curve.stopped:
                return
            loss = self.step(number, chosen[number])
            if not math.isfinite(loss):
                self.curve.stopped = f"the loss was not finite at step {number + 1}"
                return
            self.curve.train.append(loss)
            if number + 1 in validated:
                self.validate(number + 1)
                if state and self.ranks.first and self._worth_saving():
                    self.save(state, key)
            if progress:
                held = self.curve.held_out[-1].mean_kl
                progress(number + 1, self.settings.steps, f"steps, {held:.4f} on held-out text")

    def _judged(self, values: Sequence[Tensor]) -> Windows:
        """The windows that judge, with the values of these snapshots."""
        self._set(values)
        return self.look(self.judging)

    def _set(self, values: Sequence[Tensor]) -> None:
        """Give the student the values of these snapshots."""
        for vector, value in zip(self.student.trainable, values, strict=True):
            vector.adopt(value)

    def _worth_saving(self) -> bool:
        """Whether what a kill would cost by now is much more than what writing a large state takes."""
        size = 3 * sum(v.offset.nbytes for v in self.student.trainable)  # the values and two moments
        return size <= SMALL_STATE or time.monotonic() - self._saved_at > size / STATE_BYTES_A_SECOND / SAVING_SHARE

    def save(self, state: Path, key: str) -> None:
        """Write everything that a killed run needs to resume with the same numbers."""
        tensors: dict[str, Tensor] = {}
        for i, (vector, best) in enumerate(zip(self.student.trainable, self.best, strict=True)):
            moments = self.optimizer.state[vector.offset]
            tensors |= {f"offset.{i}": vector.offset, f"best.{i}": best}
            tensors |= {f"{name}.{i}": moments[name] for name in MOMENTS}
        on_host = {k: v.detach().cpu() for k, v in tensors.items()}
        save_tensors(state, on_host, {"key": key, "curve": self.curve.to_json()})
        self._saved_at = time.monotonic()

    def restore(self, state: Path, key: str) -> int:
        """Load the state that `save` wrote for the same key.

        Returns the number of steps done, 0 without such a file, or where it is damaged.
        """
        stored = read_state(state, functools.partial(self._stored, key=key))
        if stored is None:
            return 0
        self.curve, tensors = stored
        for i, vector in enumerate(self.student.trainable):
            vector.offset.detach().copy_(tensors[f"offset.{i}"])
            self.best[i] = tensors[f"best.{i}"].to(vector.offset.device)
            moments = {n: tensors[f"{n}.{i}"].to(vector.offset.device) for n in MOMENTS[1:]}
            self._put_moments(vector, tensors[f"{MOMENTS[0]}.{i}"], moments)
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
                wanted = vector.start().shape if name == "best" else vector.offset.shape
                if name != "step" and found.shape != wanted:
                    raise ValueError(f"{name}.{i} has the shape {tuple(found.shape)}")
        return LossCurve.from_json(meta["curve"]), tensors


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
