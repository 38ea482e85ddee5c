"""The adapter's delta to one weight of the merged checkpoint, computed when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from requant.adapters.lora import Lora
from requant.checkpoint.pieces import Piece
from requant.merge.plan import MergePlan, Op
from requant.merge.stage import compute, read_base
from requant.numerics.delta_retention import Delta, Deltas

NOISE = 2.0**-20  # of the norm of a sum's parts: what fp32 leaves of a sum that is zero
ROUNDINGS = 2.0**-22  # of a weight, for each fold: four roundings to nearest in fp32


def deltas(plan: MergePlan, pieces: Mapping[str, Piece] | None = None) -> Deltas:
    """Function from a merged checkpoint's tensor name to the tensor's delta to the base.

    The delta is None where the adapters do not change the tensor, or cancel each other out.
    pieces: names of experts' matrices -> the pieces of stacked tensors that hold them. The delta of one stacked tensor
    is kept until another is asked for: the matrices of a layer come one after the other.
    """
    changed = {op.name: op for op in plan.ops if op.folds or op.replacement is not None}
    pieces = pieces or {}

    @lru_cache(maxsize=1)
    def stacked(name: str) -> Tensor | None:
        return _difference(plan, changed[name])

    def delta(name: str) -> Delta | None:
        piece = pieces.get(name)
        if piece is not None:
            whole = stacked(piece.stacked) if piece.stacked in changed else None
            return None if whole is None else Delta(piece.of(whole).contiguous())
        return delta_of(plan, changed[name]) if name in changed else None

    return delta


def delta_of(plan: MergePlan, op: Op) -> Delta | None:
    """Merged minus base weight [out, in] of one op, before rounding.

    For plain LoRA it is given as factors, else as one matrix. None where several deltas cancel each other out: what is
    left of them is rounding noise, of which nothing can be kept or lost.
    Raises ValueError for a replacement with other rows than the base: a row that is not in the base has no delta.
    """
    assert op.source is not None
    plain = [f for f in op.folds if isinstance(f, Lora) and f.magnitude is None]
    if plain and len(plain) == len(op.folds) and op.replacement is None:
        factors = [(f.scaling * left, right) for f in plain for left, right in [f.factors()]]
        if len(factors) > 1 and _cancel(factors):
            return None
        return Delta(torch.cat([left for left, _ in factors], dim=1), torch.cat([right for _, right in factors]))
    if op.shape != op.source.shape:
        raise ValueError(f"{op.name}: resized from {op.source.shape} to {op.shape}")
    whole = _difference(plan, op)
    if whole is None:
        return None
    return Delta(whole.T.contiguous() if op.conv1d else whole)


def _difference(plan: MergePlan, op: Op) -> Tensor | None:
    """Merged minus base tensor of one op as the checkpoint stores it, fp32; None for roundings of several folds."""
    assert op.source is not None
    base = read_base(plan, op.source).float()
    whole = compute(plan, op)[0].float() - base
    noise = len(op.folds) > 1 and bool((whole.abs() <= len(op.folds) * ROUNDINGS * base.abs()).all())
    return None if noise else whole


def _cancel(factors: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the sum of left @ right over all factors is nothing beside its parts, in fp64."""
    lefts, rights = ([factor.double() for factor in side] for side in zip(*factors, strict=True))
    parts = sum(_square(left, right) for left, right in zip(lefts, rights, strict=True))
    return _square(torch.cat(lefts, dim=1), torch.cat(rights)) <= NOISE**2 * parts


def _square(left: Tensor, right: Tensor) -> float:
    """<left @ right, left @ right>, without the product."""
    return float(((left.T @ left) * (right @ right.T)).sum())
