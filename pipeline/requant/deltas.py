"""What the adapter changes in one weight of the merged checkpoint, by the tensor's name, read when asked for."""

from __future__ import annotations

from requant.adapter import Fold
from requant.merge import MergePlan, Op, compute
from requant.survival import Delta, Deltas


def deltas(plan: MergePlan) -> Deltas:
    """Name of a tensor of the merged checkpoint -> its delta to the base it was merged onto, None when untouched."""
    touched = {op.name: op for op in plan.ops if op.fold is not None or op.replacement is not None}

    def delta(name: str) -> Delta | None:
        return of(plan, touched[name]) if name in touched else None

    return delta


def of(plan: MergePlan, op: Op) -> Delta:
    """W - D of one op before rounding, [out, in]: in factors for plain LoRA, else (DoRA, a replaced weight) as a whole.

    Raises ValueError for a replacement that has other rows than the base: there is no delta to a row that was not there.
    """
    assert op.source is not None
    if op.fold is not None and _factored(op, op.fold):
        left, right = op.fold.factors()
        return Delta(left * op.fold.scaling, right)
    if op.shape != op.source.shape:
        raise ValueError(f"{op.name}: resized from {op.source.shape} to {op.shape}")
    whole = compute(plan, op)[0].float() - plan.base.read(op.source.name).float()
    return Delta(whole.T.contiguous() if op.conv1d else whole)


def _factored(op: Op, fold: Fold) -> bool:
    return fold.magnitude is None and op.replacement is None
