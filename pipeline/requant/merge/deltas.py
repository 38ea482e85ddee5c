"""The adapter's delta to one weight of the merged checkpoint, computed when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from requant.adapters.lora import Lora
from requant.checkpoint.pieces import Piece
from requant.merge.plan import MergePlan, Op
from requant.merge.stage import compute, read_base
from requant.numerics.delta_retention import Delta, Deltas


def deltas(plan: MergePlan, pieces: Mapping[str, Piece] | None = None) -> Deltas:
    """Function from a merged checkpoint's tensor name to the tensor's delta to the base.

    The delta is None where the adapter does not change the tensor.
    pieces: names of experts' matrices -> the pieces of stacked tensors that hold them. The delta of one stacked tensor
    is kept until another is asked for: the matrices of a layer come one after the other.
    """
    changed = {op.name: op for op in plan.ops if op.folds or op.replacement is not None}
    pieces = pieces or {}

    @lru_cache(maxsize=1)
    def stacked(name: str) -> Tensor:
        return _difference(plan, changed[name])

    def delta(name: str) -> Delta | None:
        piece = pieces.get(name)
        if piece is not None:
            return Delta(piece.of(stacked(piece.stacked)).contiguous()) if piece.stacked in changed else None
        return delta_of(plan, changed[name]) if name in changed else None

    return delta


def delta_of(plan: MergePlan, op: Op) -> Delta:
    """Merged minus base weight [out, in] of one op, before rounding.

    For plain LoRA it is given as factors, else as one matrix.
    Raises ValueError for a replacement with other rows than the base: a row that is not in the base has no delta.
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
    whole = _difference(plan, op)
    return Delta(whole.T.contiguous() if op.conv1d else whole)


def _difference(plan: MergePlan, op: Op) -> Tensor:
    """Merged minus base tensor of one op as the checkpoint stores it, fp32."""
    assert op.source is not None
    return compute(plan, op)[0].float() - read_base(plan, op.source).float()
