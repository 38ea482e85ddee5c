"""A recipe's healing: its text, whether it fits the machine, and the stage run on a run directory's checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from requant import __version__, deploy, heal
from requant.checkpoint.reader import Checkpoint
from requant.data.documents import Tokens
from requant.deploy.stage import demand
from requant.evaluate import variants
from requant.heal.plan import Fit, Shape, choose
from requant.heal.teacher import Progress
from requant.heal.trainer import Settings
from requant.merge.stage import DTYPES
from requant.recipe.heal_section import Heal
from requant.recipe.schema import Recipe
from requant.run import recipe_texts
from requant.runtime.device import pick_device

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Healing:
    """How and on what a checkpoint will be healed; the last `held` of the windows are not trained on.

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
    """The healing that a recipe asks for, None for none; `seen` grows by documents that no evaluation set may hold."""
    section = recipe.heal
    if section == "auto":
        section = Heal() if pick_device(recipe.device).type == "cuda" else "off"
    if not isinstance(section, Heal):
        return None
    documents, windows, held, facts = recipe_texts.healing(recipe, section, tokenizer, seen)
    seen += documents
    return Healing(section, shape, windows, held, facts, tuple(recipe.deploy))


def heal_stage(
    asked: Healing,
    places: variants.Places,
    out: Path,
    key: str,
    work: Path,
    device: torch.device,
    progress: Progress,
) -> dict[str, Any]:
    """Heal `places.gptq` into the empty directory `out`; what is returned goes into the report."""
    way, target = asked.fit(device), asked.section.target
    log.info("heal: %s", way)
    stored = DTYPES.get(str(Checkpoint(places.merged).config.get("dtype")))
    told = heal.heal(
        places.gptq, out, asked.windows, asked.held, asked.settings, way,
        teacher=lambda: variants.teacher(target, places, device=device, stored=stored), teacher_path=places.merged,
        key=key, work=work, device=device, trust_remote_code=places.trust_remote_code,
        meta={"healer": [f"requant:{__version__}"]}, progress=progress,
    )  # fmt: skip
    proof = deploy.verify(
        out, source=places.merged, deploy=asked.deploy, own=device, trust_remote_code=places.trust_remote_code
    )
    demand(proof)
    return told | {"data": asked.facts["data"], "target": target, "verify": proof.facts()}
