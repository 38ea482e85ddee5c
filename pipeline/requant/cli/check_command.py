"""The command check: what a recipe asks for, what it takes, and whether all of it fits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from requant.cli import text_view
from requant.cli.console import ConsoleWatcher
from requant.cli.foreign_output import quiet
from requant.cli.wrapping import say
from requant.runtime.library_imports import importing_models

if TYPE_CHECKING:
    from requant.recipe import Recipe
    from requant.run.check.forecast_merge import Need
    from requant.run.prepared import Prepared

INDENT = 10  # of the text beside the names


def check(recipe: Recipe, show_text: int = 0) -> None:
    """Print what `recipe` asks for and what it takes. Raises InputError for what does not fit.

    show_text: documents of every text to print.
    """
    where = Path(recipe.output.dir) / recipe.name
    with ConsoleWatcher() as watcher:
        watcher.stage("check", done=False)
        with quiet():
            with importing_models():
                from requant.run import bit_budget, disk_space, merge_onto, prepare
                from requant.run.check import delta_prediction, held_out
                from requant.run.runner import directory_of, runnable_stages
                from requant.run.shared_inputs import SharedInputs
                from requant.runtime import launch
                from requant.runtime.device import pick_device

            directory_of(recipe).check()
            inputs = SharedInputs.of_run(where)
            prepared = prepare.prepare(recipe, watcher.doing, inputs)
            runnable_stages(prepared, "report", launch.current_ranks())
            merge_onto.refuse_early(prepared, inputs)
            need, free = disk_space.check_disk(prepared, where)
            device = pick_device(recipe.device)
            watcher.doing("what rounding keeps of the adapter, on a few blocks")
            predicted = delta_prediction.predict(prepared.merge.plan, prepared.quantize.plan, device)
    _print_contents(prepared)
    if prepared.merge.other is not None:
        scored = merge_onto.tokens_to_score(prepared)
        _line("merge", f"onto: auto: run first scores both merges on {scored} tokens of the evaluation sets")
    if prepared.widths:
        _line("budget", bit_budget.ahead(prepared))
    _print_roads(prepared, where)
    _line("disk", f"writes {need / 1e9:.2f} GB, {free / 1e9:.1f} GB free")
    _line("heal", _healing(prepared))
    if predicted:
        _line("grid", predicted.sentence())
    four_bit = prepared.merge.plan.base.four_bit
    few = held_out.few_documents(recipe, prepared.texts.sets)
    for warning in [*prepared.warnings, *few, *(predicted.warnings(four_bit=four_bit) if predicted else [])]:
        _line("warning", warning)
    if show_text:
        text_view.print_texts(prepared, show_text)
    for need_of in (needs := _forecast(prepared, where)):
        _line("takes", str(need_of))
    if len(needs) == 1:
        _line("takes", "quantize, evaluate: not tried, a block of this size takes minutes on this processor")
    print("ok")


def _forecast(prepared: Prepared, where: Path) -> list[Need]:
    """Time and memory of each stage, from one block tried here."""
    with ConsoleWatcher() as watcher:
        watcher.stage("forecast", done=False)
        with quiet():
            from requant.run import evaluation_inputs
            from requant.run.check.forecast import forecast
            from requant.runtime.device import pick_device

            device = pick_device(prepared.recipe.device)
            watcher.doing(f"one block on {device}, for time and memory")
            return forecast(
                prepared,
                evaluation_inputs.variant_sources(prepared, where),
                device,
                evaluation_inputs.dtype(prepared, device),
                evaluation_inputs.batch(prepared, device),
            )


def _line(name: str, text: str) -> None:
    say(f"{name:<{INDENT}}{text}", indent=INDENT)


def _print_contents(prepared: Prepared) -> None:
    """Base, adapter, layout, texts and servers."""
    from requant.run import task_recipe

    ledger, layout, c = prepared.merge.plan.ledger, prepared.quantize.plan, prepared.texts.calibration_facts
    done, size = ledger["adapter"], sum(s.nbytes for s in layout.slots) / 1e6
    plain = f", {prepared.held} (nf4: none)" if prepared.recipe.base.nf4 == "none" else ""
    _line("base", ", ".join(f"{n} {what}" for what, n in ledger["base"].items()) + plain)
    if carried := prepared.merge.plan.unplaced.carried_line:
        _line("carried", f"in 16 bit, for servers only: {carried}")
    _line("adapter", f"{done['consumed']} tensors, every one used: {done['folds']} LoRA, {done['replaced']} replaced")
    for m in prepared.merge.matches:
        _line("match", str(m))
    _line("dtype", prepared.dtypes)
    _line("stops", str(prepared.merge.stops or "where the base does"))
    _line("quantize", f"{len(layout.grids)} linears, {layout.bits_per_weight:.2f} bits a weight, {size:.1f} MB")
    _line("calibrate", f"{c['windows']} windows of {c['length']} tokens from {', '.join(c['data'])}")
    for s in prepared.texts.sets:
        shared = f"{c['overlap'][s.name]:.2%} of its 13-grams in the calibration text"
        _line("evaluate", f"{s.name}: {s.n_documents} documents, {s.n_scored} tokens, {shared}")
    for task in prepared.tasks.items if prepared.tasks else ():
        _line("task", f"{task}, of {', '.join(prepared.task_variants)}")
    if prepared.tasks and (served := [n for n in prepared.task_variants if n in task_recipe.served(prepared.recipe)]):
        _line("task", f"vLLM answers for {' and '.join(served)}, in time and memory of its own, which are not forecast")
    for verdict in prepared.quantize.engines:
        _line("serve", f"{verdict.target.name} {verdict}")
    if (prompts := prepared.texts.prompts) is not None:
        taken = f"{len(prompts.items)} prompts from {prompts.set_name}, {prompts.new_tokens} tokens each at most"
        _line("answers", taken if prompts.items else f"none: {prompts.set_name}: {prompts.why}")
    if prepared.texts.canaries:
        _line("canaries", f"{len(prepared.texts.canaries.items)} prompts from {prepared.texts.canaries.name}")


def _print_roads(prepared: Prepared, where: Path) -> None:
    """Other ways to ship that are measured, and those that cannot be."""
    from requant.run import evaluation_inputs, road_recipe

    for said in road_recipe.sentences(prepared.recipe, evaluation_inputs.variant_sources(prepared, where)):
        _line("road", said)


def _healing(prepared: Prepared) -> str:
    from requant.runtime.device import pick_device

    if prepared.heal is None:
        asked = prepared.recipe.heal
        return "off" if asked == "off" else "off: auto heals on a GPU only; give heal settings of its own to heal here"
    s = prepared.heal.section
    plan = prepared.heal.plan(pick_device(prepared.recipe.device))
    text = prepared.heal.text
    reads = ", ".join(f"{name} {often:.1f} times" for name, often in zip(text.names, text.reads, strict=True))
    return f"{s.steps} steps of {s.batch} x {s.length} tokens, {plan}; reads {reads}"
