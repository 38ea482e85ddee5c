"""The base that the adapter is merged onto, measured for `merge.onto: auto`.

Done before the stages, since all that they do depends on it; the result is stored and not measured again.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, cast

from requant.checkpoint.run_directory import RunDirectory, key_of
from requant.evaluate import merge_onto_probe
from requant.evaluate.merge_onto_probe import WORDS, Onto
from requant.evaluate.planned_merge import Device
from requant.merge.plan import MergePlan
from requant.recipe import Recipe
from requant.run import evaluation_inputs, expert_order, onto_choice, prepare
from requant.run.observer import Watcher
from requant.run.prepared import Prepared
from requant.run.shared_inputs import SharedInputs
from requant.run.stage_results import OntoDecision
from requant.runtime.device import pick_device

if TYPE_CHECKING:
    from requant_eval.scoring.windows import EvalSet

LAYOUT = 1  # raised when what is measured changes
NAME = "merge onto"


def decided(
    prepared: Prepared, directory: RunDirectory, watcher: Watcher, inputs: SharedInputs | None = None
) -> Prepared:
    """`prepared`, with the base known and `merge.onto` in its recipe replaced by it.

    Where the original is taken, everything is prepared again from it. inputs: what it was prepared with.
    """
    wanted, other = prepared.recipe, prepared.merge.other
    if wanted.merge.onto != "auto":
        return prepared
    if other is None:
        return replace(prepared, recipe=_with(wanted, "dequantized"))
    choice = _measured(prepared, directory, watcher)
    watcher.doing(f"merged onto {WORDS[choice['onto']]}: {choice['why']}")
    recipe = _with(wanted, choice["onto"])
    if choice["onto"] == "dequantized":
        return replace(prepared, recipe=recipe, choice=choice)
    again = expert_order.decided(prepare.prepare(recipe, watcher.doing, inputs), directory, watcher)
    return replace(again, choice=choice)


def refuse_early(prepared: Prepared, inputs: SharedInputs) -> None:
    """Raise InputError where the merge onto the original, which a run may take, would be refused."""
    if prepared.merge.other is not None:
        prepare.prepare(_with(prepared.recipe, "original"), shared=inputs)


def tokens_to_score(prepared: Prepared) -> int:
    """The tokens of the evaluation sets that both merges will be scored on."""
    return sum(part.n_scored for part in parts(prepared))


def parts(prepared: Prepared) -> list[EvalSet]:
    """The part of each evaluation set that both merges are scored on."""
    tokens = merge_onto_probe.TOKENS[pick_device(prepared.recipe.device).type]
    return [merge_onto_probe.part(s, tokens) for s in prepared.texts.sets]


def _with(recipe: Recipe, onto: Onto) -> Recipe:
    return recipe.model_copy(update={"merge": recipe.merge.model_copy(update={"onto": onto})})


def _measured(prepared: Prepared, directory: RunDirectory, watcher: Watcher) -> OntoDecision:
    """Which base is taken and why, measured or as it was stored."""
    plan, other, sources = prepared.merge.plan, prepared.merge.other, prepared.sources
    assert other is not None
    assert sources.original is not None
    device = pick_device(prepared.recipe.device)
    where = Device(device, evaluation_inputs.dtype(prepared, device), evaluation_inputs.batch(prepared, device))
    key = key_of(
        LAYOUT,
        NAME,
        directory.fingerprint(sources.base),
        asdict(sources.simulate) if sources.simulate else None,
        directory.fingerprint(sources.original),
        [(directory.fingerprint(a.path), a.weight, a.expert_order) for a in plan.adapters],
        [(s.name, s.digest) for s in prepared.texts.sets],
        (str(where.dtype), device.type),
    )
    stored = directory.result(NAME, key)
    if stored is not None:
        return cast(OntoDecision, stored)
    watcher.stage(NAME, done=False)
    plans: dict[Onto, MergePlan] = {"dequantized": plan, "original": other}
    some, trust = parts(prepared), prepared.recipe.trust_remote_code
    scores = merge_onto_probe.measure(plans, some, where, trust_remote_code=trust, doing=watcher.doing)
    choice = onto_choice.decide(onto_choice.facts_of(some, scores))
    directory.remember(NAME, key, dict(choice))
    return choice
