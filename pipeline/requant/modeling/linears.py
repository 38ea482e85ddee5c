"""Every matrix of a model as a Linear: Conv1D transposed, fused experts split.

Makes a model that other code can walk without special cases: a quantizable weight is the `weight` [out, in] of a module
that `is_linear`, called once in every forward, in a fixed order, on the rows that it acts on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from requant.modeling import moe
from requant.modeling.families import EXPERT_CLASSES, LINEAR_CLASSES


class TransposedLinear(nn.Linear):
    """A GPT-2 style Conv1D, stored as [in, out], as a Linear that holds [out, in]."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by its `weight` [out, in] and adds its `bias`, nothing else."""
    return type(module) in (nn.Linear, TransposedLinear) or type(module).__name__ in LINEAR_CLASSES


def expose(model: nn.Module, single: Callable[[str], bool]) -> None:
    """Replace Conv1D and fused experts of a model on the meta device, in place.

    single: whether a checkpoint holds the experts of the module of this name one by one. Others stay fused: there is no
    name for a matrix of theirs that a server would look for.
    """
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if type(module) is Conv1D:
            inputs, outputs = module.weight.shape
            _replace(model, name, TransposedLinear(inputs, outputs, bias=module.bias is not None, device="meta"))
        elif _splittable(module) and single(name):
            _replace(model, name, moe.split(module))
            module._parameters.clear()  # the module lives on for its way to combine gate and up


def _splittable(module: Any) -> bool:
    """Fused experts of transformers 5 (integrations/moe.py), and of classes that hold them in the same two tensors."""
    own = type(module).__name__ in EXPERT_CLASSES and module.gate_up_proj is not None
    return fused_experts(module) or own


def fused_experts(module: nn.Module) -> bool:
    """Whether a module is one of transformers' containers of fused experts."""
    return hasattr(module, "is_concatenated") and hasattr(module, "has_gate") and hasattr(module, "_apply_gate")


def left_fused(model: nn.Module) -> list[str]:
    """Names of experts' weights, [experts, ...] or [experts * rows, columns], that stay fused, in 16 bit."""
    return [
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        for leaf, parameter in ({} if is_linear(module) else module._parameters).items()
        if parameter is not None and parameter.ndim in (2, 3) and "bias" not in leaf
        if "expert" in (name + type(module).__name__).lower()
    ]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
