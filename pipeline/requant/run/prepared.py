"""`Prepared`: plans, settings and texts of one recipe, grouped by stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from requant.data.canaries import Canaries
from requant.data.documents import TokenDocument
from requant.data.prompts import Prompts
from requant.deploy import engine_support
from requant.evaluate.adapter_probe import ProbeRow
from requant.evaluate.tasks import Tasks
from requant.merge import adapter_match
from requant.merge.base_checkpoint import DecodedCheckpoint
from requant.merge.base_weights import Nf4Settings
from requant.merge.plan import MergePlan
from requant.merge.stop_tokens import StopTokens
from requant.merge.stored_dtype import planned_dtype
from requant.quantize.plan import Plan, Settings
from requant.recipe import Recipe
from requant.recipe.quantize_section import OverrideFields
from requant.run.end_formats import PlannedEnds
from requant.run.heal_recipe import Healing
from requant.run.recipe_texts import CalibrationFacts
from requant.run.stage_results import BudgetDecision, OntoDecision

if TYPE_CHECKING:
    from requant_eval.scoring.windows import EvalSet


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Local directories of the models.

    simulate: how a 16-bit base was quantized for training, if it was.
    """

    base: Path
    adapter: Path
    original: Path | None
    simulate: Nf4Settings | None


@dataclass(frozen=True, kw_only=True)
class MergeInputs:
    """What merge needs.

    onto_original: the plan of the variant `original`. matches: one for each adapter. stops: tokens that end a turn of
    the fine-tune and that the base's configs lack. other: the merge onto the 16-bit base, where `merge.onto: auto` has
    yet to choose between it and `plan`.
    """

    plan: MergePlan
    onto_original: MergePlan | None
    matches: tuple[adapter_match.Match, ...]
    stops: StopTokens | None = None
    other: MergePlan | None = None


@dataclass(frozen=True, kw_only=True)
class QuantizeInputs:
    """What quantize needs.

    dtype: of serving and of unquantized tensors. engines: which of them load the result. notes: what of the experts
    stays in 16 bit, and why. readers: format that is written -> the engines that load it. ends: quantized token
    embeddings and head.
    """

    plan: Plan
    settings: Settings
    dtype: torch.dtype
    engines: tuple[engine_support.Verdict, ...]
    notes: tuple[str, ...] = ()
    readers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ends: PlannedEnds = field(default_factory=PlannedEnds)

    def served_as(self, layout: str, names: Sequence[str]) -> tuple[str, ...]:
        """Those of the engines `names` that load the result in this format, and in none before it."""
        loading = {verdict.target.name for verdict in self.engines if verdict.loads and verdict.format == layout}
        return tuple(name for name in names if name in loading)


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Tokenized texts.

    calibration: int64 [samples, length]. probes: calibration source -> a few rows for the adapter probe.
    first_documents: of each calibration source. decode: token ids -> text. prompts: of held-out rows, for
    answers side by side.
    """

    calibration: Tensor
    calibration_facts: CalibrationFacts
    sets: tuple[EvalSet, ...]
    probes: Mapping[str, tuple[ProbeRow, ...]]
    canaries: Canaries | None
    prompts: Prompts | None = None
    first_documents: Mapping[str, Sequence[TokenDocument]]
    decode: Callable[[list[int]], str]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Plans, settings and texts of one recipe.

    heal: None when it was not asked for, or `auto` left it out.
    choice: how `merge.onto: auto` was decided. budget: the same of `quantize.budget`. widths: those that it may give,
    where it is yet to be decided.
    unloadable: why transformers 5 cannot load the base as training did; None when it can.
    """

    recipe: Recipe
    sources: Sources
    merge: MergeInputs
    quantize: QuantizeInputs
    texts: Texts
    heal: Healing | None
    unloadable: str | None
    warnings: tuple[str, ...]
    tasks: Tasks | None = None
    choice: OntoDecision | None = None
    widths: tuple[int, ...] = ()
    budget: BudgetDecision | None = None

    @property
    def task_variants(self) -> tuple[str, ...]:
        """The variants to run tasks on, of those that are scored.

        What ships, ends or healed, is in place of gptq, or beside it where gptq was asked for.
        """
        asked = self.recipe.evaluate.task_variants
        ships = "ends" if self.quantize.ends.grids else "healed" if self.heal else "gptq"
        wanted = ("adapter", "merged", ships) if asked == "auto" else (*asked, "healed", "ends")
        return tuple(name for name in dict.fromkeys(wanted) if name in self.variants)

    @property
    def questions(self) -> tuple[Canaries | Prompts, ...]:
        """What variants answer: canaries and prompts; the latter are asked of adapter, merged model and what ships."""
        texts, ships = self.texts, "ends" if self.quantize.ends.grids else "healed" if self.heal else "gptq"
        canaries = (texts.canaries,) if texts.canaries else ()
        prompts = texts.prompts if texts.prompts and texts.prompts.items else None
        return (*canaries, *((replace(prompts, asked=("adapter", "merged", ships)),) if prompts else ()))

    @property
    def variants(self) -> tuple[str, ...]:
        """The variants to score: those asked for, rtn as a road; with gptq healed and ends in a run that makes them."""
        named = self.recipe.evaluate.variants
        asked: list[str] = [v for v in named if v not in ("healed", "ends")]
        if "rtn" in self.recipe.evaluate.roads and "rtn" not in asked:
            asked.append("rtn")
        if self.heal and ("gptq" in asked or "healed" in named):
            asked.append("healed")
        if self.quantize.ends.grids and ("gptq" in asked or "ends" in named):
            asked.append("ends")
        return tuple(asked)

    @property
    def overrides(self) -> dict[str, OverrideFields]:
        """The recipe's `quantize.overrides`, without defaults."""
        asked = self.recipe.quantize.overrides
        set_fields = {n: own.model_dump(exclude_none=True, exclude_defaults=True) for n, own in asked.items()}
        return cast("dict[str, OverrideFields]", set_fields)

    @property
    def held(self) -> str:
        """How a base that training did not quantize lies on disk, in words."""
        checkpoint = self.merge.plan.base.checkpoint
        if isinstance(checkpoint, DecodedCheckpoint):
            return f"base in {checkpoint.format_name}, decoded as training held it"
        return "base in 16 bit as training held it"

    @property
    def dtypes(self) -> str:
        """In what the merged checkpoint is stored and the quantized one served, in a sentence."""
        stored, why = planned_dtype(self.merge.plan.base.checkpoint, self.recipe.merge.dtype)
        served = str(self.quantize.dtype).removeprefix("torch.")
        proof = ", if one forward in float16 is finite" if "float16" in (stored, served) else ""
        return f"merged in {stored} ({why}), served in {served}{proof}"

    @property
    def unmeasurable(self) -> str | None:
        """Why base and adapter of this recipe cannot be evaluated; None when they can."""
        if self.unloadable is None:
            return None
        if self.recipe.evaluate.stream == "never":
            return f"{self.unloadable}: set evaluate.stream to auto"
        if self.heal and self.heal.section.target == "adapter":
            return f"{self.unloadable}: set heal.target to merged"
        if any(a.expert_pairs for a in self.merge.plan.adapters):
            return (
                f"{self.unloadable}, and the adapter's stacked experts are of transformers 5: "
                "base.nf4.transformers is wrong"
            )
        return None
