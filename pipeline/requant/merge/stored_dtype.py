"""The dtype of a merged checkpoint: one in which the model runs, and every weight fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from requant.checkpoint import model_files
from requant.checkpoint.reader import Checkpoint, read_tensor
from requant.errors import InputError
from requant.merge.plan import MergePlan, Op
from requant.modeling.families import NEEDS_BFLOAT16
from requant.numerics.dtypes import DTYPES
from requant.numerics.finite import largest_magnitude


def overflows_in_float16(config: Mapping[str, Any]) -> str | None:
    """The model type of a config.json whose activations exceed float16's range; None: not known to."""
    types = (section.get("model_type") for section in (config, config.get("text_config") or {}))
    return next((t for t in types if t in NEEDS_BFLOAT16), None)


def refuse_float16(config: Mapping[str, Any], asked: Mapping[str, str]) -> None:
    """Raise InputError when a key of the recipe asks for float16 and the model does not run in it.

    asked: key of the recipe -> its value.
    """
    kind = overflows_in_float16(config)
    keys = [key for key, value in asked.items() if value == "float16"]
    if kind is not None and keys:
        raise InputError(
            f"{keys[0]}: float16: the activations of {kind} exceed float16's range (65504), so the model gives NaN, "
            "and vLLM refuses it: set it to bfloat16 or auto"
        )


def own_dtype(checkpoint: Checkpoint) -> str:
    """The dtype that a base declares, or most of its floating-point values are stored in."""
    declared = model_files.stored_dtype(checkpoint.config)
    if declared is not None:
        return declared
    sizes = Counter[torch.dtype]()
    for info in checkpoint.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] += info.nbytes
    return str(sizes.most_common(1)[0][0]).removeprefix("torch.") if sizes else "bfloat16"


def serving_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The 16-bit type that a model of this base runs in: float16 only for a float16 base that runs in it."""
    runs = own_dtype(checkpoint) == "float16" and overflows_in_float16(checkpoint.config) is None
    return torch.float16 if runs else torch.bfloat16


def planned_dtype(checkpoint: Checkpoint, asked: str) -> tuple[str, str]:
    """(dtype of the merged checkpoint, the reason for it), from headers: every weight is taken to fit float16.

    `auto` is the base's own 16-bit type, and bfloat16 where float16 is too small for what the model computes.
    """
    if asked != "auto":
        return asked, "asked for in the recipe"
    own, kind = own_dtype(checkpoint), overflows_in_float16(checkpoint.config)
    if own == "float16" and kind is not None:
        return "bfloat16", f"the activations of {kind} exceed float16's 65504"
    if own in ("float16", "bfloat16"):
        return own, "the base's own dtype"
    return "bfloat16", f"has the range of the base's {own}"


def choose_dtype(plan: MergePlan, asked: str) -> tuple[str, str]:
    """`planned_dtype`, where no weight can exceed it."""
    chosen, why = planned_dtype(plan.base.checkpoint, asked)
    if asked != "auto" or chosen != "float16":
        return chosen, why
    largest = max((bound(plan, op), op.name) for op in plan.ops if op.role != "state")
    if largest[0] < torch.finfo(torch.float16).max:
        return "float16", f"{why}; no weight can exceed {largest[0]:.4g} of 65504"
    return "bfloat16", f"{largest[1]} may reach {largest[0]:.4g}, above float16's 65504"


def expected_dtype(checkpoint: Checkpoint, asked: str) -> torch.dtype:
    """The dtype of `planned_dtype`."""
    return DTYPES[planned_dtype(checkpoint, asked)[0]]


def bound(plan: MergePlan, op: Op) -> float:
    """An upper bound of max |w| of an output tensor, without decoding it.

    It is computed from the scales of packed weights and the norms of a delta.
    """
    assert op.source is not None
    if op.replacement is not None:
        largest = largest_magnitude(read_tensor(op.replacement))
    elif op.source.kind == "packed":
        largest = largest_magnitude(plan.base.absmax(op.source))
    else:
        largest = largest_magnitude(plan.base.checkpoint.read(op.source.name))
    for fold in op.folds:
        largest = fold.bound(largest)
    return largest
