"""What the adapter changes in one weight of the merged checkpoint, by the tensor's name, read when asked for."""

from __future__ import annotations

import torch

from requant.adapters.lora import Lora
from requant.merge.plan import MergePlan, Op
from requant.merge.stage import compute
from requant.numerics.delta_retention import Delta, Deltas


def deltas(plan: MergePlan) -> Deltas:
    """Name of a tensor of the merged checkpoint -> its delta to the base it was merged onto, None when untouched."""
    touched = {op.name: op for op in plan.ops if op.folds or op.replacement is not None}

    def delta(name: str) -> Delta | None:
        return of(plan, touched[name]) if name in touched else None

    return delta


def of(plan: MergePlan, op: Op) -> Delta:
    """W - D of one op before rounding, [out, in]: in factors for plain LoRA, else (DoRA, a replaced weight) as a whole.

    Raises ValueError for a replacement that has other rows than the base: there is no delta to a row that was not there.
    """
    assert op.source is not None
    plain = [f for f in op.folds if isinstance(f, Lora) and f.magnitude is None]
    if plain and len(plain) == len(op.folds) and op.replacement is None:
        factors = [(f.scaling, *f.factors()) for f in plain]
        return Delta(
            torch.cat([s * left for s, left, _ in factors], dim=1), torch.cat([right for *_, right in factors])
        )
    if op.shape != op.source.shape:
        raise ValueError(f"{op.name}: resized from {op.source.shape} to {op.shape}")
    whole = compute(plan, op)[0].float() - plan.base.read(op.source.name).float()
    return Delta(whole.T.contiguous() if op.conv1d else whole)
