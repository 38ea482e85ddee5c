"""The serving dtype of a recipe; float16 is refused where the model does not run in it."""

from __future__ import annotations

import torch

from requant.merge import stored_dtype
from requant.merge.plan import MergePlan
from requant.numerics.dtypes import DTYPES
from requant.recipe import Recipe


def serving_dtype(recipe: Recipe, plan: MergePlan) -> torch.dtype:
    """The dtype servers will run in: the recipe's, or the base's own 16-bit type."""
    asked = recipe.quantize.dtype
    return stored_dtype.serving_dtype(plan.base.checkpoint) if asked == "auto" else DTYPES[asked]


def refuse_float16(recipe: Recipe, plan: MergePlan) -> None:
    """Raise InputError where the recipe asks for float16 and the model is known not to run in it."""
    asked = {"merge.dtype": recipe.merge.dtype, "quantize.dtype": recipe.quantize.dtype}
    stored_dtype.refuse_float16(plan.base.checkpoint.config, asked | {"evaluate.dtype": recipe.evaluate.dtype})
