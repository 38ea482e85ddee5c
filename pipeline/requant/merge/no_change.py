"""Adapters that change nothing: untrained ones, and deltas that cancel each other out."""

from __future__ import annotations

from requant.adapters.fold import read
from requant.errors import InputError
from requant.merge import refusals
from requant.merge.deltas import delta_of
from requant.merge.plan import MergePlan
from requant.merge.stage import UNTRAINED, compute

CANCELLED = (
    "{}: together these adapters change nothing: their LoRA deltas cancel each other out in every module; "
    "correct the weights, or leave adapters out"
)


def refuse_no_change(plan: MergePlan) -> None:
    """Raise InputError where all adapters together change no weight.

    No weight of the base is read where one module has one adapter whose tensors all hold something.
    """
    changed = [op for op in plan.ops if op.folds]
    if not changed or any(a.replaced for a in plan.adapters):
        return
    alone = [op.folds[0] for op in changed if len(op.folds) == 1]
    if any(all(read(t).any() for t in fold.tensors) for fold in alone):
        return
    if not any(compute(plan, op)[1] for op in changed):
        raise InputError(UNTRAINED.format(refusals.paths(plan.adapters)))
    if all(delta_of(plan, op) is None for op in changed):
        raise InputError(CANCELLED.format(refusals.paths(plan.adapters)))
