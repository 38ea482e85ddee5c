"""Settings of healing: steps, batch, learning rate schedule, when to validate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

Tune = Literal["scales", "codes", "norms"]
MAX_VALIDATIONS, MIN_STEPS_BETWEEN = 10, 5  # validations after step 0
WARM_UP = 0.1  # share of the steps in which the learning rate rises


@dataclass(frozen=True, slots=True, kw_only=True)
class HealSettings:
    """The settings of a healing: `steps` optimizer steps on `batch` windows of `length` tokens.

    lr: the largest change of an offset, relative to its scale, in one step. code_lr: that of a code's latent, in codes.
    tune: what is trained.
    """

    steps: int = 600
    batch: int = 16
    length: int = 512
    lr: float = 5e-3
    code_lr: float = 1e-3
    tune: tuple[Tune, ...] = ("scales", "codes")
    seed: int = 0

    def share_of_rate(self, step: int) -> float:
        """Share of the learning rates at step 0, 1, ...: linear warm-up, then half a cosine down to 0."""
        warm = max(1, round(WARM_UP * self.steps))
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def validation_steps(self) -> set[int]:
        """Numbers of steps after which the held-out loss is taken; 0 and the last are among them."""
        count = max(1, min(MAX_VALIDATIONS, self.steps // MIN_STEPS_BETWEEN))
        return {round(self.steps * i / count) for i in range(count + 1)}


class HealSettingsFacts(TypedDict):
    """`HealSettings` as stored."""

    steps: int
    batch: int
    length: int
    lr: float
    code_lr: float
    tune: Sequence[Tune]
    seed: int
