"""Convolutions that a checkpoint holds in parts: each part is a parameter of its own here.

Gated delta nets convolve queries, keys and values apart in their files, and together in transformers' classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class ConvolutionPart(nn.Module):
    """The weight [channels, 1, width] of one part of a convolution, as stored."""

    def __init__(self, channels: int, whole: nn.Conv1d) -> None:
        super().__init__()
        self.weight = nn.Parameter(whole.weight.new_empty(channels, *whole.weight.shape[1:]), requires_grad=False)


class JoinedConvolution(nn.Module):
    """A convolution without bias whose weight is that of its parts, one after the other.

    Only the weight is asked for: the classes that have it call a kernel of their own.
    """

    bias = None

    def __init__(self, parts: Iterable[ConvolutionPart]) -> None:
        super().__init__()
        self.parts = tuple(parts)  # modules beside this one, by the names of the checkpoint

    @property
    def weight(self) -> Tensor:
        return torch.cat([part.weight for part in self.parts])


def expose(model: nn.Module, rules: Iterable[Any]) -> None:
    """Cut the convolutions of a model on the meta device that its checkpoints hold in parts, in place.

    rules: transformers' conversions for the model.
    """
    for rule in rules:
        if [type(op).__name__ for op in getattr(rule, "operations", ())] != ["Concatenate"] or rule.operations[0].dim:
            continue
        target, sources = _module(rule.target_patterns[0]), [_module(pattern) for pattern in rule.source_patterns]
        for name, module in list(model.named_modules()):
            if type(module) is nn.Conv1d and module.bias is None and f".{name}".endswith(f".{target}"):
                _cut(model, module, name, [name.removesuffix(target) + source for source in sources])


def _cut(model: nn.Module, whole: nn.Conv1d, name: str, names: list[str]) -> None:
    """Replace a convolution by parts of these names."""
    sizes = [_outputs(model, part) for part in names]
    if sum(sizes) != whole.weight.shape[0]:
        return
    parts = [ConvolutionPart(size, whole) for size in sizes]
    for path, module in [*zip(names, parts, strict=True), (name, JoinedConvolution(parts))]:
        owner, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(owner), leaf, module)


def _outputs(model: nn.Module, part: str) -> int:
    """The channels of a part: the outputs of the projection before it, q_proj of q_conv1d; 0 where it has none."""
    owner, _, leaf = part.rpartition(".")
    projection: Any = getattr(model.get_submodule(owner), f"{leaf.partition('_')[0]}_proj", None)
    return int(getattr(projection, "out_features", 0))


def _module(pattern: str) -> str:
    """The module that the pattern of a conversion names."""
    return pattern.replace("\\", "").removesuffix(".weight")
