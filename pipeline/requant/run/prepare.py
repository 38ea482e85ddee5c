"""Prepare: sources, plans and texts of a recipe, cross-checked before any weight is read.

`requant check` prints the result, `requant run` starts from it. Raises InputError for what would fail later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from requant import merge
from requant.adapters import peft_directory
from requant.checkpoint import model_files
from requant.data import canaries
from requant.data.canaries import Canaries
from requant.data.documents import adds_bos
from requant.data.prompts import Prompts
from requant.deploy import gguf_export
from requant.errors import InputError
from requant.evaluate import adapter_probe, variant_weights
from requant.evaluate.tasks import Tasks
from requant.heal.model_size import ModelSize
from requant.merge import adapter_completeness, adapter_match, config_agreement, stored_dtype
from requant.merge.base_checkpoint import DecodedCheckpoint, open_base_checkpoint
from requant.merge.base_weights import Nf4Settings
from requant.merge.model_layout import ModelLayout
from requant.merge.plan import MergePlan
from requant.merge.stop_tokens import StopTokens, stop_tokens
from requant.modeling import skeleton
from requant.modeling.embedding_rows import refuse_unknown_ids
from requant.recipe import Recipe, named_files
from requant.run import (
    answer_prompts,
    base_precision,
    budget_widths,
    dtypes,
    output_formats,
    positions,
    recipe_texts,
    unknown_ids,
)
from requant.run.base_precision import check_base, hints, nf4_settings
from requant.run.calibration_size import too_few_tokens
from requant.run.fetch import fetch
from requant.run.fixed_beginning import fixed_beginnings
from requant.run.heal_recipe import Healing, plan_healing
from requant.run.prepared import MergeInputs, Prepared, QuantizeInputs, Sources, Texts
from requant.run.quantize_inputs import quantize_inputs_of, single_experts
from requant.run.road_recipe import refuse_roads
from requant.run.shared_inputs import SharedInputs
from requant.run.task_recipe import load_tasks, servers
from requant.tracking import trackers

if TYPE_CHECKING:
    from requant_eval.scoring.windows import EvalSet

log = logging.getLogger(__name__)
MODEL_KEYS = ("base", "adapter", "adapters", "merge", "trust_remote_code")  # of what is read of the models
TEXT_KEYS = (*MODEL_KEYS, "chat_date", "calibration", "heal", "evaluate", "canaries", "device")
SHOWN = 20  # documents of each source that are kept for `check --show-text`


def prepare(
    recipe: Recipe, doing: Callable[[str], None] = lambda _: None, shared: SharedInputs | None = None
) -> Prepared:
    """Resolve and cross-check everything that a recipe names, from headers and texts only.

    doing: receives what is done now, in words. shared: of several recipes, which have parts in common.
    """
    shared = shared or SharedInputs()
    named_files.check(recipe)
    refuse_roads(recipe)
    trackers.require(recipe.output.track, recipe.place("output", "track"))
    doing(_reading(recipe))
    models = shared.once("models", recipe, MODEL_KEYS, lambda: _models(recipe), "original" in recipe.evaluate.variants)
    sources, loaded, merge_inputs, model, single = models
    plan = merge_inputs.plan
    dtypes.refuse_float16(recipe, plan)
    quantize_inputs, widths = _quantize_inputs(recipe, sources, plan, model, single)
    unloadable = base_precision.unloadable(plan, model, sources.simulate)
    warnings = _warnings(recipe, loaded, merge_inputs, model, quantize_inputs)
    warnings += [*quantize_inputs.notes, *([unloadable] if unloadable else [])]
    tokenizer = shared.once(
        "tokenizer", recipe, (*MODEL_KEYS, "chat_date"),
        lambda: recipe_texts.load_tokenizer(recipe, plan.base.checkpoint.path, sources.adapter),
    )  # fmt: skip
    merge_inputs = replace(merge_inputs, stops=_stop_tokens(sources.adapter, plan, tokenizer))
    size = ModelSize.of(single, quantize_inputs.plan.grids)
    texts, healing, told = shared.once(
        "texts", recipe, TEXT_KEYS, lambda: _texts(recipe, tokenizer, size, shared, doing)
    )
    texts = replace(texts, prompts=_prompts(recipe, shared, tokenizer, model, merge_inputs))
    tasks = _tasks(recipe, shared, tokenizer, model, merge_inputs, doing)
    healing = replace(healing, size=size, deploy=tuple(recipe.deploy)) if healing else None
    warnings += told
    if plan.embedding_rows is not None:
        refuse_unknown_ids(unknown_ids.ids_of(texts, healing), plan.embedding_rows, tokenizer, unknown_ids.OF_TRAINING)
    texts = positions.fitted(model, texts, healing, warnings)
    warnings += too_few_tokens(recipe.calibration, quantize_inputs.plan.shapes)
    return Prepared(
        recipe=recipe, sources=sources, merge=merge_inputs, quantize=quantize_inputs, texts=texts, heal=healing,
        unloadable=unloadable, warnings=tuple(warnings), tasks=tasks, widths=widths,
    )  # fmt: skip


def _quantize_inputs(
    recipe: Recipe, sources: Sources, plan: MergePlan, model: Any, single: Any
) -> tuple[QuantizeInputs, tuple[int, ...]]:
    """(the quantized layout and who loads it, the widths that a budget may give; none without a budget)."""

    def planned(wanted: Recipe) -> QuantizeInputs:
        inputs = quantize_inputs_of(wanted, plan, single)
        output_formats.refuse_unpackable(wanted, inputs.plan)
        if gguf_export.FORMAT in wanted.output.formats:
            output_formats.refuse_gguf(wanted, sources, plan, inputs.plan, model)
        return inputs

    def served(wanted: Recipe) -> QuantizeInputs:
        inputs = planned(wanted)
        output_formats.refusing_engines(servers(wanted), inputs.engines)
        return inputs

    return (planned(recipe), ()) if recipe.quantize.budget is None else budget_widths.planned(recipe, served)


def _prompts(recipe: Recipe, shared: SharedInputs, tokenizer: Any, model: Any, of: MergeInputs) -> Prompts | None:
    """The prompts that variants answer; gates decide whether it is an error that there are none."""
    keys = (*TEXT_KEYS, "gates")
    return shared.once("answers", recipe, keys, lambda: answer_prompts.load(recipe, tokenizer, model, of))


def _tasks(
    recipe: Recipe, shared: SharedInputs, tokenizer: Any, model: Any, of: MergeInputs, doing: Callable[[str], None]
) -> Tasks | None:
    """The tasks that the recipe asks for, built and checked."""
    keys = (*MODEL_KEYS, "chat_date", "evaluate")
    return shared.once("tasks", recipe, keys, lambda: load_tasks(recipe, tokenizer, model, of.plan, of.stops, doing))


def _models(recipe: Recipe) -> tuple[Sources, list[peft_directory.Adapter], MergeInputs, Any, Any]:
    """Directories, the adapters' tensors by header, merge plans, the skeleton, and it with single experts."""
    sources, loaded = _sources(recipe)
    merge_inputs, model = _merge_inputs(recipe, sources, loaded)
    plan = merge_inputs.plan
    if isinstance(plan.base.checkpoint, DecodedCheckpoint):
        plan.base.checkpoint.check_scales()
    return sources, loaded, merge_inputs, model, single_experts(recipe, plan, model)


def _warnings(
    recipe: Recipe,
    loaded: Sequence[peft_directory.Adapter],
    merge_inputs: MergeInputs,
    model: Any,
    quantize_inputs: QuantizeInputs,
) -> list[str]:
    """What a user should know of base, adapters and servers. Raises InputError where a server of `deploy` refuses."""
    plan = merge_inputs.plan
    warnings = [*plan.warnings, *(w for m in merge_inputs.matches for w in m.warnings)]
    warnings += hints(recipe, [adapter.base_name for adapter in plan.adapters])
    for adapter in loaded:
        warnings += [*adapter.notes, *adapter_completeness.missing(adapter, plan, model)]
    warnings += config_agreement.lacking_buffers(plan.base, model)
    return warnings + output_formats.refusing_engines(servers(recipe), quantize_inputs.engines)


def _reading(recipe: Recipe) -> str:
    """What is read first, in words; ids of a hub are named as such, which may take a while."""
    base, directory = recipe.base, recipe.directory
    sources = [base.source, *(adapter for adapter, _ in recipe.weighted_adapters)]
    sources += [base.original] if base.original is not None else []
    hub = ", ".join(dict.fromkeys(source.path for source in sources if not source.is_local(directory)))
    downloads = f"; downloads from the hub what is not here of {hub}" if hub else ""
    return f"headers of {base.source.path} and the adapter{downloads}"


def _sources(recipe: Recipe) -> tuple[Sources, list[peft_directory.Adapter]]:
    """Local directories of base, adapters and original, and the adapters' tensors by header."""
    trust, directory, base = recipe.trust_remote_code, recipe.directory, recipe.base
    where = recipe.place("base", "model")
    model = fetch(base.source, directory, trust_remote_code=trust, place=where)
    loaded = []
    for i, (source, weight) in enumerate(recipe.weighted_adapters):
        where = recipe.place("adapter") if recipe.adapter else recipe.place("adapters", i, "path")
        path = fetch(source, directory, trust_remote_code=trust, kind="adapter", place=where)
        loaded.append(peft_directory.load(path, weight=weight, expert_order=source.expert_order))
    original = model if base.sixteen_bit and not base.original else None
    if base.original:
        original = fetch(base.original, directory, trust_remote_code=trust, place=recipe.place("base", "original"))
    simulate = nf4_settings(recipe.base.nf4)
    loaded = peft_directory.named_apart(loaded)
    return Sources(base=model, adapter=loaded[0].path, original=original, simulate=simulate), loaded


def _merge_inputs(
    recipe: Recipe, sources: Sources, loaded: Sequence[peft_directory.Adapter]
) -> tuple[MergeInputs, Any]:
    """Merge plans and how well each adapter matches the base; the model skeleton."""
    trust, original = recipe.trust_remote_code, sources.original
    check_base(recipe, sources.base)
    if recipe.merge.onto == "original":
        plan, model = _onto_original(recipe, original or sources.base, loaded)
    else:
        plan, model = plan_merge(sources.base, loaded, sources.simulate, trust_remote_code=trust)
    plan = replace(plan, stored=stored_dtype.expected_dtype(plan.base.checkpoint, recipe.merge.dtype))
    scored = original is not None and "original" in recipe.evaluate.variants
    open_choice = recipe.merge.onto == "auto" and recipe.base.nf4 != "none"
    planned = _onto_original(recipe, original, loaded)[0] if original and (scored or open_choice) else None
    adapter_completeness.check_vocabulary(loaded, plan, model)
    bases = [(s.path, s.revision) for s in (recipe.base.source, recipe.base.original) if s]
    matches = tuple(adapter_match.match(adapter, plan, bases) for adapter in loaded)
    onto_original, other = planned if scored else None, planned if open_choice else None
    return MergeInputs(plan=plan, onto_original=onto_original, matches=matches, other=other), model


def _onto_original(recipe: Recipe, original: Path, loaded: Sequence[peft_directory.Adapter]) -> tuple[MergePlan, Any]:
    """The merge onto the 16-bit base; what is wrong with that base names its key."""
    where = f"{recipe.place('base', 'original')}: " if recipe.base.original else ""
    try:
        plan, model = plan_merge(original, loaded, None, trust_remote_code=recipe.trust_remote_code)
    except InputError as error:
        raise InputError(f"{where}{error}") from error
    if plan.base.packed:
        raise InputError(f"{where}{original}: a 4-bit checkpoint: expected the 16-bit model behind base.model")
    return plan, model


def _stop_tokens(adapter: Path, plan: MergePlan, tokenizer: Any) -> StopTokens | None:
    """Stop tokens of a fine-tune that brings a tokenizer of its own, where the base's configs lack them."""
    if not model_files.tokenizer_files(adapter, None):
        return None
    base = plan.base.checkpoint
    return stop_tokens(tokenizer, base.path, base.config)


def _texts(
    recipe: Recipe, tokenizer: Any, size: ModelSize, shared: SharedInputs, doing: Callable[[str], None]
) -> tuple[Texts, Healing | None, list[str]]:
    """Calibration, healing and evaluation texts, and warnings about them."""
    notes: list[str] = []
    doing("tokens of the calibration text")
    seen, windows, facts = recipe_texts.calibration(recipe, tokenizer, notes, shared.tokenize)
    of_calibration = dict(zip(facts["data"], (documents[:SHOWN] for documents in seen), strict=False))
    healing = plan_healing(recipe, tokenizer, seen, size, notes, shared.tokenize)
    sets = []
    for item in recipe.evaluate.sets:
        doing(f"tokens of the evaluation set {item.name}")
        sets.append(recipe_texts.evaluation_set(recipe, item.name, tokenizer, seen, notes, shared.tokenize))
    warnings = [*dict.fromkeys(notes), *fixed_beginnings(recipe, sets)]
    doing("overlap of calibration and evaluation text")
    facts["overlap"] = _overlaps(windows, healing, tuple(sets), warnings)
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    texts = Texts(
        calibration=windows,
        calibration_facts=facts,
        sets=tuple(sets),
        probes=adapter_probe.sample_rows(facts["data"], recipe_texts.probed(recipe, tokenizer, seen), bos),
        canaries=_canaries(recipe, tokenizer),
        first_documents=of_calibration,
        decode=tokenizer.decode,
    )
    return texts, healing, warnings


def _overlaps(
    windows: Tensor, healing: Healing | None, sets: tuple[EvalSet, ...], warnings: list[str]
) -> dict[str, float]:
    """Share of each set's 13-grams that the calibration text contains.

    The same of the healing text is written to the healing's own facts.
    """
    if healing:
        drawn = torch.unique(healing.text.windows, dim=0)
        healing.facts["overlap"] = recipe_texts.overlaps(drawn, sets, warnings, "healing")
    return recipe_texts.overlaps(windows, sets, warnings)


def _canaries(recipe: Recipe, tokenizer: Any) -> Canaries | None:
    asked = recipe.canaries
    return canaries.load(asked.resolve(recipe.directory), tokenizer, asked.format) if asked else None


def plan_merge(
    base: str | Path,
    loaded: peft_directory.Adapter | Sequence[peft_directory.Adapter],
    simulate: Nf4Settings | None = None,
    *,
    trust_remote_code: bool = False,
) -> tuple[MergePlan, Any]:
    """(merge plan, model skeleton) of one or several adapters on one base, from headers.

    simulate: how a 16-bit base was quantized in training; None: it was not, or `base` is stored in 4 bits.
    """
    base = Path(base)
    checkpoint = open_base_checkpoint(base)
    skeleton.check_generation_config(base)
    model: Any = skeleton.open_model(base, trust_remote_code=trust_remote_code)
    stored = variant_weights.open_base(checkpoint, model, simulate)
    layout = ModelLayout.of(model, stored)
    planned = merge.plan(stored, loaded, layout)
    config_agreement.check(stored, model, layout)
    return planned, model
