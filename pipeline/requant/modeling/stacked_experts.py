"""Locations of stacked expert parameters in a checkpoint.

They are stored as one tensor, or as one tensor for each expert and projection.
transformers 5 holds the experts of a layer in parameters [experts, rows, columns]; adapters are named after these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from requant.modeling import moe


def stacked(
    model: nn.Module, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StackedParameter]:
    """Name of a stacked parameter -> its stored tensors, of a model from `skeleton.build`.

    names: `skeleton.tensor_names`. shapes: of the checkpoint's tensors. A parameter that is not stored is left out.
    """
    found: dict[str, StackedParameter] = {}
    for name, experts in moe.split_experts(model):
        found |= _split(name, experts, names, shapes)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and name in names:
            owner = model.get_submodule(name.rpartition(".")[0])
            transposed = bool(getattr(owner, "is_transposed", False))
            found[name] = StackedParameter(
                shape=_three(parameter.shape), transposed=transposed, pieces=(Piece(names[name]),)
            )
    return found


def _split(
    module: str, experts: moe.SplitExperts, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StackedParameter]:
    """The two stacked parameters that one module of split experts replaces."""
    found = {}
    for leaf, roles in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
        linear: nn.Linear = experts.get_submodule(f"0.{roles[0]}")  # type: ignore[assignment]
        height, columns = linear.weight.shape
        shape = (experts.count, height * len(roles), columns)
        whole = next((n for n in (f"{module}.{leaf}", f"{module}.{leaf}".partition(".")[2]) if n in shapes), None)
        places = [
            (f"{module}.{expert}.{role}.weight", expert, i * height)
            for expert in range(experts.count)
            for i, role in enumerate(roles)
        ]
        if whole is not None and shapes[whole] == shape:
            found[f"{module}.{leaf}"] = StackedParameter(shape=shape, transposed=False, pieces=(Piece(whole),))
        elif all(n in names and shapes[names[n]] == (height, columns) for n, _, _ in places):
            pieces = tuple(Piece(names[n], expert, first, first + height) for n, expert, first in places)
            found[f"{module}.{leaf}"] = StackedParameter(shape=shape, transposed=False, pieces=pieces)
    return found


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    count, rows, columns = shape
    return count, rows, columns


@dataclass(frozen=True, slots=True)
class Piece:
    """One stored tensor of a stacked parameter: rows of one expert, or all (expert None)."""

    name: str
    expert: int | None = None
    first: int = 0
    last: int = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class StackedParameter:
    """A stacked parameter [experts, rows, columns]; transposed: it is [experts, in, out]."""

    shape: tuple[int, int, int]
    transposed: bool
    pieces: tuple[Piece, ...]
