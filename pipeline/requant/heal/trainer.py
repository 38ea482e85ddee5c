"""Healing's training loop: moves a student's scales to bring a loss down; windows not trained on pick the best step.

Step 0 is among them: the result is never worse than the start there. A killed run goes on with the same numbers.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from requant.errors import StageError
from requant.heal import kl_loss
from requant.heal.student import Student, Tune
from requant.heal.teacher import Teacher, head_of, precision, product_dtype
from requant.modeling import block_walk
from requant_eval.scoring.lm_head import HeadTap

log = logging.getLogger(__name__)
Progress = Callable[[int, int, str], None]
LOOKS, EVERY = 10, 5  # at most so many looks at the held-out windows, and at least so many steps between two
WARM_UP = 0.1  # share of the steps in which the learning rate rises


@dataclass(frozen=True, slots=True)
class Settings:
    """How to heal. batch windows of `length` tokens a step; lr: how far an offset, relative
    to its scale, may go in one."""

    steps: int = 150
    batch: int = 16
    length: int = 512
    lr: float = 5e-3
    tune: tuple[Tune, ...] = ("scales",)
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: linear warm-up, then half a cosine down to 0."""
        warm = max(1, round(WARM_UP * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def looks(self) -> set[int]:
        """Numbers of steps after which the held-out windows decide."""
        count = max(1, min(LOOKS, self.steps // EVERY))
        return {round(self.steps * i / count) for i in range(count + 1)}


@dataclass
class Curve:
    """How healing went. train: KL of each step, nats a token. held: (steps done, KL on held-out windows)."""

    train: list[float] = field(default_factory=list)
    held: list[tuple[int, float]] = field(default_factory=list)
    stopped: str | None = None  # why it ended early

    @property
    def best(self) -> tuple[int, float]:
        return min(self.held, key=lambda point: point[1])


def batches(count: int, settings: Settings) -> list[list[int]]:
    """Numbers of the windows of every step: epochs in an order of their own, from the seed alone."""
    need, order = settings.steps * settings.batch, []
    for epoch in range(-(-need // count)):
        generator = torch.Generator().manual_seed(settings.seed * 1000003 + epoch)
        order += torch.randperm(count, generator=generator).tolist()
    return [order[i * settings.batch : (i + 1) * settings.batch] for i in range(settings.steps)]


class Trainer:
    """Moves the scales of one student. loss(numbers) is the summed loss of these windows, each its mean over tokens."""

    def __init__(
        self, pupil: Student, loss: Callable[[Sequence[int]], Tensor], train: int, held: int, settings: Settings,
        *, micro: int | None = None,
    ) -> None:  # fmt: skip
        """Windows 0 .. train-1 are trained on, the next `held` judge. micro: windows in one forward; None: a batch."""
        self.pupil, self.loss, self.settings = pupil, loss, settings
        self.train, self.held = train, range(train, train + held)
        self.micro = micro or settings.batch
        self.optimizer = torch.optim.AdamW([m.offset for m in pupil.movable], lr=settings.lr)
        self.best = [m.offset.clone() for m in pupil.movable]
        self.curve = Curve()

    def step(self, number: int, chosen: Sequence[int]) -> float:
        """One step; returns the loss before it. Nothing moves when that is not finite."""
        for m in self.pupil.movable:
            assert m.offset.grad is not None
            m.offset.grad.zero_()
        total = 0.0
        for at in range(0, len(chosen), self.micro):
            loss = self.loss(chosen[at : at + self.micro]) / len(chosen)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if math.isfinite(total):
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.rate(number)
            self.optimizer.step()
            self.pupil.refresh()
        return total

    @torch.no_grad()
    def held_out(self) -> float:
        """Mean loss of the held-out windows."""
        parts = [self.held[i : i + self.micro] for i in range(0, len(self.held), self.micro)]
        return sum(float(self.loss(part)) for part in parts) / len(self.held)

    def look(self, done: int) -> None:
        """Let the held-out windows judge the state after `done` steps."""
        value = self.held_out()
        if not math.isfinite(value):
            if not done:
                raise StageError(
                    "healing: the checkpoint gives NaN or infinity on the healing text: nothing to start from"
                )
            self.curve.stopped = f"the KL on held-out text was not finite after {done} steps"
            return
        if done and value < self.curve.best[1]:
            self.best = [m.offset.clone() for m in self.pupil.movable]
        self.curve.held.append((done, value))

    def run(self, state: Path | None, key: str = "", progress: Progress | None = None) -> Curve:
        """All steps, going on from the file `state` if it belongs to `key`; the student ends as it was at its best."""
        chosen, looks = batches(self.train, self.settings), self.settings.looks()
        begin = self.restore(state, key) if state else 0
        with repeatable(self.best[0].device):
            if not self.curve.held:
                self.look(0)
            for number in range(begin, self.settings.steps):
                loss = self.step(number, chosen[number])
                if not math.isfinite(loss):
                    self.curve.stopped = f"the loss was not finite at step {number + 1}"
                if self.curve.stopped:
                    break
                self.curve.train.append(loss)
                if number + 1 in looks:
                    self.look(number + 1)
                    if state:
                        self.save(state, key)
                if progress:
                    progress(number + 1, self.settings.steps, f"{self.curve.held[-1][1]:.4f} on held-out text")
        for m, offset in zip(self.pupil.movable, self.best, strict=True):
            m.offset.copy_(offset)
        self.pupil.refresh()
        return self.curve

    def save(self, state: Path, key: str) -> None:
        """Everything a killed run needs to go on with the same numbers."""
        tensors: dict[str, Tensor] = {}
        for i, (m, best) in enumerate(zip(self.pupil.movable, self.best, strict=True)):
            moments = self.optimizer.state[m.offset]
            tensors |= {f"offset.{i}": m.offset, f"best.{i}": best}
            tensors |= {f"{name}.{i}": moments[name] for name in ("step", "exp_avg", "exp_avg_sq")}
        temporary = state.with_name(state.name + ".tmp")
        save_file(
            {k: v.detach().cpu() for k, v in tensors.items()},
            temporary,
            {"key": key, "curve": json.dumps(asdict(self.curve))},
        )
        temporary.replace(state)

    def restore(self, state: Path, key: str) -> int:
        """Take up what `save` left for the same key; returns the number of steps done."""
        if not state.exists():
            return 0
        with safe_open(state, framework="pt") as file:
            meta = file.metadata()
            if meta.get("key") != key:
                return 0
            told = json.loads(meta["curve"])
            self.curve = Curve(told["train"], [(int(n), v) for n, v in told["held"]], told["stopped"])
            for i, m in enumerate(self.pupil.movable):
                m.offset.copy_(file.get_tensor(f"offset.{i}"))
                self.best[i].copy_(file.get_tensor(f"best.{i}"))
                moments = {n: file.get_tensor(f"{n}.{i}") for n in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[m.offset] = {
                    n: v if n == "step" else v.to(m.offset.device) for n, v in moments.items()
                }
        self.pupil.refresh()
        return len(self.curve.train)


class EndToEnd:
    """The loss of a whole student: KL(teacher || student) over all positions of `windows` int64 [n, length].

    The last `held` windows judge again and again: what the teacher says of them is kept.
    """

    def __init__(self, pupil: Student, teacher: Teacher, windows: Tensor, held: int, device: torch.device) -> None:
        self.pupil, self.teacher, self.windows, self.device = pupil, teacher, windows, device
        self.keep = range(len(windows) - held, len(windows))
        self.kept: dict[tuple[int, ...], Tensor] = {}
        self.tap = HeadTap(pupil.model)
        self.head = head_of(pupil.model, windows[:1].to(device))

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        ids = self.windows[list(numbers)].to(self.device)
        theirs = self._theirs(numbers)
        with precision(self.device):
            hidden, _ = self.tap.run(self.pupil.model, ids)
        total = kl_loss.divergence(
            hidden.flatten(0, 1), self.head, theirs.flatten(0, 1), self.teacher.head, product_dtype(self.device)
        )
        return total / ids.shape[1]

    def _theirs(self, numbers: Sequence[int]) -> Tensor:
        """The teacher's hidden states; those of held-out windows are kept, since they are asked for again and again."""
        if not set(numbers) <= set(self.keep):
            return self.teacher.hidden(numbers)
        if tuple(numbers) not in self.kept:
            self.kept[tuple(numbers)] = self.teacher.hidden(numbers).to(product_dtype(self.device))
        return self.kept[tuple(numbers)]


def thrifty(model: Any) -> None:
    """Keep only the blocks' inputs for the backward pass, and run each block again there."""
    for block in block_walk.block_list(model)[1]:
        block.forward = functools.partial(recompute, block.forward, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """The same sums in the same order every time, where the device has such kernels."""
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
