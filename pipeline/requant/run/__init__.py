"""Run: the stages of a recipe in order.

Only this package, and cli for printing, reads a Recipe.

    runner              run(recipe): skip what is finished, run the rest   <- start here
    sweep               a run for each combination of values, what they have in common made once
    shared_inputs       parts of recipes that several have in common
    stages              the list of stages, one record each
    context             what the stages of one run share
    prepare             recipe -> plans, texts and settings of all stages, from headers
    disk_space          what a run still writes, against what is free
    fetch               the local directory of a base or an adapter
    dtypes              the serving dtype, and float16 refused where a model does not run in it
    positions           windows longer than the positions that a model has
    prepared            the record that prepare returns: sources, merge, quantize, texts
    quantize_inputs     settings and layout of quantize, and the engines that load it
    unknown_ids         the token ids of all texts; what is wrong where a model has no embedding for one
    served_experts      which experts are quantized: those that some server reads so
    stage_keys          what each stage depends on, as digests
    stage_results       shapes of stored results and events
    merge_stage         the merged checkpoint
    quantize_stage      the GPTQ checkpoint, and what comes before it
    probe               does the adapter lower the loss on its own text
    merge_onto          onto which base the adapter is merged, measured for merge.onto: auto
    onto_choice         the rule of it: from both losses to the base that is taken
    bit_budget          the width of every linear, chosen by measured losses for quantize.budget
    bit_allocation      the rule of it: the widths of least total loss within a budget
    budget_widths       the units of linears, and the widths that formats and servers leave to choose from
    expert_order        in which order an adapter holds its experts, measured where no file says it
    heal_stage          the healed checkpoint
    end_formats         quantized token embeddings and head, and the formats that hold them
    convert_stage       the same in other formats
    evaluate_stage      scores
    answer_prompts      prompts of held-out rows that variants answer
    road_recipe         other ways to ship as a recipe asks for them
    roads_stage         these made by the libraries that people use for them, and scored
    task_recipe         tasks of lm-evaluation-harness as a recipe asks for them
    tasks_stage         their results on adapter, merged model and what ships
    suggest_stage       which modules are worth more bits
    track_stage         the report sent to experiment trackers
    report_stage        report.json, its renderings, model cards
    base_precision      what training quantized the base to: base.nf4 against its files
    fixed_beginning     evaluation sets whose documents begin with the same tokens
    calibration_size    whether the calibration text is large enough for the widths
    recipe_texts        calibration text and evaluation sets
    evaluation_inputs   files of the variants, dtype and batch of the evaluation
    heal_recipe         healing as a recipe asks for it
    heal_checkpoint     healing of any GPTQ checkpoint, without a recipe
    report_facts        what the report says besides scores
    base_facts          of the base: its name, how training held it, its size
    format_facts        of the formats that the checkpoint was written in
    output_formats      which engines read which format, and what each cannot hold
    module_swap         what a module costs: measured by swapping it
    suggest             candidates for more bits, and the recipe patch
    observer            what a run reports while it runs, and what it leaves
    check               forecasts of time, memory and loss (`requant check`)

May import: every package but cli; requant_eval.
"""

import sys
from types import ModuleType
from typing import Any

from requant.run.observer import Outcome, Watcher
from requant.run.runner import run

__all__ = ["Outcome", "Watcher", "run"]


class _CallablePackage(ModuleType):
    """This package, called as its function: `from requant import run` gives either of the two."""

    def __call__(self, *arguments: Any, **options: Any) -> Outcome:
        return run(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
