"""Run: the stages of a recipe in order. The only package that reads a Recipe.

    runner              run(recipe): skip what is whole, run the rest   <- start here
    prepare             recipe -> plans, texts and settings of all stages, from headers
    stage_keys          what each stage depends on, as digests
    recipe_texts        calibration text and evaluation sets
    evaluation_inputs   where variants are made from, dtype, batch, the probe
    heal_recipe         healing as a recipe asks for it
    heal_checkpoint     healing of any GPTQ checkpoint, without a recipe
    report_facts        what the report says besides scores
    module_swap         what a module costs: measured by swapping it
    suggest             which modules are worth more bits
    observer            what a run reports while it goes, and what it leaves
    check               forecasts of time, memory and loss (`requant check`)

May import: every package but cli; requant_eval.
"""

from requant.run.observer import Outcome, Watcher
from requant.run.runner import run

__all__ = ["Outcome", "Watcher", "run"]
