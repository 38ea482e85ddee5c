"""Everything that can be known before the first weight is read: sources, plans, texts, and whether they fit together.

`requant check` prints it; `requant run` starts from it. Raises InputError for whatever would fail later.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from requant import merge
from requant.adapters import peft_directory as adapters
from requant.checkpoint import model_files
from requant.checkpoint.reader import Checkpoint
from requant.data import canaries
from requant.data.canaries import Canaries
from requant.deploy import engine_support
from requant.errors import InputError
from requant.evaluate import adapter_probe, variant_weights
from requant.heal.plan import Shape
from requant.merge import adapter_match
from requant.merge.base_weights import Nf4Settings
from requant.merge.plan import MergePlan, Structure
from requant.merge.stage import DTYPES
from requant.modeling import linears, skeleton, stacked_experts
from requant.numerics.grid import Grid
from requant.quantize import gptqmodel_engine
from requant.quantize import plan as layout
from requant.recipe.fields import Source
from requant.recipe.model_sections import Nf4
from requant.recipe.schema import Recipe
from requant.run import recipe_texts
from requant.run.heal_recipe import Healing, plan_healing

if TYPE_CHECKING:
    from requant_eval.scoring.windows import EvalSet

log = logging.getLogger(__name__)
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]


@dataclass(frozen=True)
class Prepared:
    """Plans and texts of one recipe."""

    recipe: Recipe
    base: Path
    adapter: Path
    original: Path | None
    simulate: Nf4Settings | None
    merge: MergePlan
    original_merge: MergePlan | None
    quantize: layout.Plan
    settings: layout.Settings
    serving_dtype: torch.dtype
    calibration: Tensor
    calibration_facts: dict[str, Any]
    sets: tuple[EvalSet, ...]
    targets: tuple[engine_support.Verdict, ...]
    warnings: tuple[str, ...]
    matches: tuple[adapter_match.Match, ...]  # one for each adapter
    probes: Mapping[str, tuple[Tensor, ...]]  # calibration source -> a few token rows
    heal: Healing | None  # None: not asked for, or left out by `auto`
    canaries: Canaries | None = None
    unheld: str | None = None  # why transformers 5 cannot hold the base as training did

    @property
    def variants(self) -> tuple[str, ...]:
        """What is scored: as asked for, and healed where gptq is, if healing is done at all."""
        asked: list[str] = [v for v in self.recipe.evaluate.variants if v != "healed"]
        if self.heal and ("gptq" in asked or "healed" in self.recipe.evaluate.variants):
            asked.append("healed")
        return tuple(asked)

    @property
    def overrides(self) -> dict[str, dict[str, Any]]:
        """The recipe's `quantize.overrides`, without defaults."""
        asked = self.recipe.quantize.overrides
        return {name: own.model_dump(exclude_none=True, exclude_defaults=True) for name, own in asked.items()}

    @property
    def unmeasurable(self) -> str | None:
        """Why this recipe's base and adapter cannot be measured, known from headers."""
        if self.unheld is None:
            return None
        if self.recipe.evaluate.stream == "never":
            return f"{self.unheld}: set evaluate.stream to auto"
        if self.heal and self.heal.section.target == "adapter":
            return f"{self.unheld}: set heal.target to merged"
        if any(a.experts for a in self.merge.adapters):
            return f"{self.unheld}, and the adapter's stacked experts are of transformers 5: base.nf4.transformers is wrong"
        return None


def prepare(recipe: Recipe) -> Prepared:
    """Resolve and cross-check everything a recipe names, from headers and texts only."""
    trust = recipe.trust_remote_code
    base = fetch(recipe.base.source, recipe.directory, trust)
    loaded = [adapters.load(fetch(s, recipe.directory, trust), weight=w) for s, w in recipe.weighted_adapters]
    original = fetch(s, recipe.directory, trust) if (s := recipe.base.sixteen_bit) else None
    simulate = _settings(recipe.base.nf4)
    onto_original = recipe.merge.onto == "original"
    plan, model = plan_merge(
        original if onto_original and original else base, loaded, None if onto_original else simulate, trust
    )
    fork = plan_merge(original, loaded, None, trust)[0] if original and "original" in recipe.evaluate.variants else None
    bases = [(s.path, s.revision) for s in (recipe.base.source, recipe.base.original) if s]
    matches = tuple(adapter_match.match(a, plan, bases) for a in loaded)
    warnings = [*plan.warnings, *(w for m in matches for w in m.warnings), *_hints(recipe)]
    dtype = serving_dtype(recipe, plan)
    settings = quantize_settings(recipe)
    if recipe.quantize.engine == "gptqmodel":
        gptqmodel_engine.check(settings)
    planned = plan_quantize(plan, model, settings, dtype)
    verdicts = tuple(engine_support.judge(planned, model, target) for target in engine_support.TARGETS.values())
    unheld = _unheld(plan, model, simulate)
    warnings += [*_deployment(recipe, verdicts), *_left_fused(model), *([unheld] if unheld else [])]
    tokenizer = recipe_texts.load_tokenizer(plan.base.checkpoint.path, loaded[0].path, plan, trust)
    seen, windows, facts = recipe_texts.calibration(recipe, tokenizer)
    healing = plan_healing(recipe, tokenizer, seen, Shape.of(model, planned.grids))
    sets = tuple(recipe_texts.evaluation_set(recipe, item.name, tokenizer, seen) for item in recipe.evaluate.sets)
    facts["overlap"] = _overlaps(windows, healing, sets, warnings)
    return Prepared(
        recipe,
        base,
        loaded[0].path,
        original,
        simulate,
        plan,
        fork,
        planned,
        settings,
        dtype,
        windows,
        facts,
        sets,
        verdicts,
        tuple(warnings),
        matches,
        adapter_probe.rows(facts["data"], seen),
        healing,
        _canaries(recipe, tokenizer),
        unheld,
    )


def _overlaps(
    windows: Tensor, healing: Healing | None, sets: tuple[EvalSet, ...], warnings: list[str]
) -> dict[str, float]:
    """What the sets share with the calibration text; with the healing text it is kept in the healing's own facts."""
    if healing:
        drawn = torch.unique(healing.windows, dim=0)
        healing.facts["overlap"] = recipe_texts.overlaps(drawn, sets, warnings, "healing")
    return recipe_texts.overlaps(windows, sets, warnings)


def _canaries(recipe: Recipe, tokenizer: Any) -> Canaries | None:
    asked = recipe.canaries
    return canaries.load(asked.resolve(recipe.directory), tokenizer, asked.format) if asked else None


def _hints(recipe: Recipe) -> list[str]:
    """What the recipe leaves unused."""
    if recipe.base.original and recipe.merge.onto == "dequantized" and "original" not in recipe.evaluate.variants:
        return [
            "base.original is set and not measured: the variant original says which base is the better one to merge onto"
        ]
    return []


def fetch(source: Source, directory: Path, trust_remote_code: bool) -> Path:
    """The local directory of a source; a hub id is downloaded to the hub cache (safetensors and small files only)."""
    if source.is_local(directory):
        path = Path(source.resolve(directory))
        if path.suffix == ".gguf":
            raise InputError(
                f"{path}: a GGUF file: no adapter was trained on these numbers. Use the bitsandbytes 4-bit or 16-bit checkpoint "
                "(safetensors) that the adapter's base_model_name_or_path names"
            )
        if not path.is_dir():
            raise InputError(f"{path}: no such directory")
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*_PATTERNS, *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(source.path, revision=source.revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise InputError(
            f"{source.path}: no such local directory, and the hub does not give it: {reason}. "
            "Check the name, HF_TOKEN for gated models, or begin a local path with ./"
        ) from error


def _settings(nf4: Nf4 | str) -> Nf4Settings | None:
    if isinstance(nf4, str):
        return None
    return Nf4Settings(nf4.quant_type, nf4.double_quant, nf4.blocksize, nf4.load_dtype, nf4.skip, nf4.transformers)


def plan_merge(
    base: Path, loaded: adapters.Adapter | Sequence[adapters.Adapter], simulate: Nf4Settings | None, trust: bool
) -> tuple[MergePlan, Any]:
    """(merge plan, model skeleton) of one adapter, or several that add up, on one base, from headers."""
    checkpoint = Checkpoint(base)
    refuse_quantized(checkpoint)
    model: Any = skeleton.build(skeleton.load_config(base, trust_remote_code=trust), trust_remote_code=trust)
    names = skeleton.tensor_names(model, checkpoint)
    conv1d = frozenset(skeleton.conv1d_modules(model))
    stored = variant_weights.open_base(checkpoint, model, simulate)
    embedding = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    experts = stacked_experts.stacked(model, names, {w.name: w.shape for w in stored.weights.values()})
    structure = Structure(
        names, conv1d, skeleton.tied_pair(model), f"{embedding}.weight", experts, lambda n: skeleton.renamed(model, n)
    )
    return merge.plan(stored, loaded, structure), model


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raise InputError for a base in a quantized format other than bitsandbytes 4-bit."""
    file = checkpoint.path / "config.json"
    method = (checkpoint.config.get("quantization_config") or {}).get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise InputError(
            f"{file}: the base is quantized with {method}; adapters are merged onto bitsandbytes 4-bit or 16-bit bases. "
            "Use the 16-bit model that it was made from"
        )


def serving_dtype(recipe: Recipe, plan: MergePlan) -> torch.dtype:
    """The dtype servers will run in: the recipe's, or the base's own 16-bit type."""
    asked = recipe.quantize.dtype
    if asked == "auto":
        asked = model_files.stored_dtype(plan.base.checkpoint.config)  # type: ignore[assignment]
    return torch.float16 if asked == "float16" else torch.bfloat16


def quantize_settings(recipe: Recipe) -> layout.Settings:
    q = recipe.quantize
    overrides: list[tuple[str, Mapping[str, Any] | None]] = []
    for pattern, own in q.overrides.items():
        changed = {k: v for k in ("bits", "group_size", "symmetric") if (v := getattr(own, k)) is not None}
        overrides.append((pattern, None if own.skip else changed))
    grid = Grid(q.bits, q.group_size, q.symmetric, q.signed_scales, q.scale_search)
    damp = None if q.damp == "auto" else float(q.damp)
    return layout.Settings(
        grid=grid, order=q.order, sweeps=q.sweeps, correct=q.correct, damp=damp, overrides=tuple(overrides)
    )


def plan_quantize(plan: MergePlan, model: Any, settings: layout.Settings, dtype: torch.dtype) -> layout.Plan:
    """The quantized layout of a checkpoint that is not written yet."""
    slots = {s.name: s for s in plan.slots(torch.float16)}
    return layout.plan(slots, model, settings, dtype, where=plan.base.checkpoint.path)


def _deployment(recipe: Recipe, verdicts: tuple[engine_support.Verdict, ...]) -> list[str]:
    """Warnings about engines that will not load the checkpoint; for those in `deploy` it is an InputError."""
    refusals = {v.target.name: str(v) for v in verdicts if not v.loads}
    asked = [
        f"deploy: {name} {refusals[name]} ({engine_support.TARGETS[name].source})"
        for name in recipe.deploy
        if name in refusals
    ]
    if asked:
        raise InputError("\n".join([*asked, "change quantize, or take it out of deploy"]))
    return [] if recipe.deploy else [f"{name} {says}" for name, says in refusals.items()]


def _unheld(plan: MergePlan, model: Any, simulate: Nf4Settings | None) -> str | None:
    """Why transformers 5 cannot hold the base as training did; None when it can."""
    able = skeleton.quantizable(model, ("^$",))
    stored = skeleton.tensor_names(model, plan.base.weights)
    held = {p.removesuffix(".weight") for p, n in stored.items() if plan.base.weights[n].kind == "packed"} - able
    if simulate is not None:
        held |= skeleton.quantizable(model, simulate.skip, version=simulate.version) - able
    if not held:
        return None
    return (
        f"the base holds {len(held)} modules in 4 bits that transformers 5 cannot, e.g. {min(held)}: base and adapter are "
        "measured block by block, on our own decoder's values"
    )


def _left_fused(model: Any) -> list[str]:
    """A warning about expert weights that no Linear stands for."""
    left = linears.left_fused(model)
    if not left:
        return []
    return [f"{len(left)} fused expert weights stay in 16 bit, e.g. {left[0]}: this family's layout is not split"]


def check_disk(prepared: Prepared, where: Path) -> tuple[int, int]:
    """(bytes still to be written, bytes free) for the run directory `where`; raises InputError when they do not fit."""
    dtype = DTYPES.get(prepared.recipe.merge.dtype, torch.float16)
    need = sum(s.nbytes for s in prepared.merge.slots(dtype)) + sum(s.nbytes for s in prepared.quantize.slots)
    need += sum(s.nbytes for s in prepared.quantize.slots) if prepared.heal else 0
    written = [f for name in ("merged", "gptq", "healed") for f in where.glob(f"*{name}*/*.safetensors")]
    written += [f for name in ("merged", "gptq", "healed") for f in where.glob(f".{name}.partial-*/*.safetensors")]
    need = max(0, need - sum(f.stat().st_size for f in set(written)))  # of this run, or replaced by it
    existing = next(p for p in (where, *where.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if need > free:
        raise InputError(
            f"{existing}: {free / 1e9:.1f} GB free, the run writes {need / 1e9:.1f} GB: free space or set output.dir"
        )
    return need, free
