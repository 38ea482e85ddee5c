"""One healing: the checkpoint, its teacher, the text, the settings and the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from requant.data.healing_text import HealingText
from requant.heal.plan import HealPlan
from requant.heal.settings import HealSettings, Tune

Progress = Callable[[int, int, str], None]  # (done, of, note)


@dataclass(frozen=True, kw_only=True)
class HealJob:
    """What is healed, towards what, on which text and how.

    source: a GPTQ checkpoint. teacher: the 16-bit checkpoint that it was made from; block by block it is the teacher.
    load_teacher: loads the model that a student trained end to end imitates onto a device; it can be pickled where
    several ranks heal. work: a directory for the state that a killed run resumes from. key: digest of everything that
    the result depends on.
    """

    source: Path
    teacher: Path
    load_teacher: Callable[[torch.device], Any]
    text: HealingText
    settings: HealSettings
    plan: HealPlan
    device: torch.device
    work: Path
    key: str
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("source", "teacher", "work"):  # callers may give text
            object.__setattr__(self, name, Path(getattr(self, name)))

    @property
    def tune(self) -> tuple[Tune, ...]:
        """What is trained: what was asked for, without codes where the plan leaves them as they are."""
        return tuple(t for t in self.settings.tune if t != "codes" or self.plan.codes)

    @property
    def state_key(self) -> str:
        """`key` with what the plan adds to it."""
        return f"{self.key} {'+'.join(self.tune)}"

    @property
    def second(self) -> HealJob | None:
        """The job of the plan's second pass."""
        if self.plan.then is None:
            return None
        return replace(self, plan=self.plan.then, key=f"{self.state_key} {self.plan.windows} then")
