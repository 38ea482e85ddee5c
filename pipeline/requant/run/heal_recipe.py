"""Healing as a recipe asks for it: text, settings, and whether it fits the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from requant.data.documents import TokenDocument, tokenize
from requant.data.healing_text import HealingText
from requant.heal.model_size import ModelSize
from requant.heal.plan import HealPlan, choose_plan
from requant.heal.settings import HealSettings
from requant.recipe import Recipe
from requant.recipe.heal_section import Heal
from requant.run import recipe_texts
from requant.runtime.device import pick_device


@dataclass(frozen=True, kw_only=True)
class Healing:
    """The healing that a recipe asks for: settings, text and the size of the model.

    deploy: engines that must load the result, if they are installed.
    """

    section: Heal
    size: ModelSize
    text: HealingText
    facts: recipe_texts.HealingFacts
    deploy: tuple[str, ...] = ()

    @property
    def settings(self) -> HealSettings:
        """The section's settings for the stage."""
        s = self.section
        return HealSettings(
            steps=s.steps, batch=s.batch, length=s.length, lr=s.lr, code_lr=s.code_lr, tune=s.tune, seed=s.seed
        )

    @property
    def key(self) -> tuple[Any, ...]:
        """What the result depends on besides the models."""
        return (self.section.model_dump(exclude={"data", "mix", "format"}), self.facts["digest"])

    def plan(self, device: torch.device) -> HealPlan:
        """The fastest plan for the device; raises InputError when none fits."""
        mode = "whole" if self.section.target == "adapter" else self.section.mode
        return choose_plan(self.size, self.settings, self.text, device=device, mode=mode)


def plan_healing(
    recipe: Recipe,
    tokenizer: Any,
    seen: list[Sequence[TokenDocument]],
    size: ModelSize,
    notes: list[str] | None = None,
    read: recipe_texts.Tokenize = tokenize,
) -> Healing | None:
    """The healing that a recipe asks for, None for none.

    `seen` grows by documents that no evaluation set may hold, `notes` by what was left out or changed.
    """
    section = recipe.heal
    if section == "auto":
        section = Heal() if pick_device(recipe.device).type == "cuda" else "off"
    if not isinstance(section, Heal):
        return None
    documents, text, facts = recipe_texts.healing(recipe, section, tokenizer, seen, notes, read)
    seen += documents
    return Healing(section=section, size=size, text=text, facts=facts, deploy=tuple(recipe.deploy))
