"""Healing as a recipe asks for it: text, settings, and whether it fits the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from requant.data.documents import Tokens
from requant.heal.plan import Fit, Shape, choose
from requant.heal.trainer import Settings
from requant.recipe import Recipe
from requant.recipe.heal_section import Heal
from requant.run import recipe_texts
from requant.runtime.device import pick_device


@dataclass(frozen=True)
class Healing:
    """How and on what a checkpoint will be healed.

    The last `held` of the windows are not trained on.
    deploy: engines that must load the result, if they are installed.
    """

    section: Heal
    shape: Shape
    windows: Tensor
    held: int
    facts: dict[str, Any]
    deploy: tuple[str, ...] = ()

    @property
    def settings(self) -> Settings:
        s = self.section
        return Settings(s.steps, s.batch, s.length, s.lr, s.tune, s.seed)

    @property
    def key(self) -> tuple[Any, ...]:
        """What the result depends on besides the models."""
        return (self.section.model_dump(exclude={"data", "mix", "format"}), self.facts["digest"])

    def fit(self, device: torch.device) -> Fit:
        """How it fits the device; raises InputError when it does not."""
        s = self.section
        return choose(
            self.shape, steps=s.steps, batch=s.batch, length=s.length, unique=len(self.windows), held=self.held,
            looks=len(self.settings.looks()), device=device, asked="whole" if s.target == "adapter" else s.mode,
        )  # fmt: skip


def plan_healing(recipe: Recipe, tokenizer: Any, seen: list[Sequence[Tokens]], shape: Shape) -> Healing | None:
    """The healing that a recipe asks for, None for none.

    `seen` grows by documents that no evaluation set may hold.
    """
    section = recipe.heal
    if section == "auto":
        section = Heal() if pick_device(recipe.device).type == "cuda" else "off"
    if not isinstance(section, Heal):
        return None
    documents, windows, held, facts = recipe_texts.healing(recipe, section, tokenizer, seen)
    seen += documents
    return Healing(section, shape, windows, held, facts, tuple(recipe.deploy))
