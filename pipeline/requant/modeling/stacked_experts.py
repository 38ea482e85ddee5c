"""Locations of stacked expert parameters in a checkpoint.

They are stored as one tensor, or as one tensor for each expert and projection.
transformers 5 holds the experts of a layer in parameters [experts, rows, columns]; adapters are named after these.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from requant.checkpoint.pieces import Piece, PiecewiseCheckpoint
from requant.checkpoint.reader import Checkpoint
from requant.modeling import conversions, moe, skeleton, stored_parameters


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
            found |= _whole(model, name, names[name], _three(parameter.shape))
    return found


def _whole(model: nn.Module, name: str, stored: str, shape: tuple[int, int, int]) -> dict[str, StackedParameter]:
    """The stacked parameters of the class that one stored tensor holds: itself, or two whose rows take turns in it."""
    module = name.rpartition(".")[0]
    owner = model.get_submodule(module)
    transposed, (count, rows, columns) = bool(getattr(owner, "is_transposed", False)), shape
    if halves := stored_parameters.halves(owner):
        return {
            f"{module}.{leaf}": StackedParameter(
                shape=(count, rows // 2, columns), transposed=transposed, parts=(Part(stored, turns=(place,)),)
            )
            for place, leaf in enumerate(halves)
            if name.startswith(f"{module}.{halves[0]}")
        } or {name: StackedParameter(shape=shape, transposed=transposed, parts=(Part(stored),))}
    turns = (0, 1) if stored_parameters.interleaved(owner) == name.rpartition(".")[2] else ()
    return {name: StackedParameter(shape=shape, transposed=transposed, parts=(Part(stored, turns=turns),))}


def _split(
    module: str, experts: moe.SplitExperts, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StackedParameter]:
    """The two stacked parameters that one module of split experts replaces."""
    found = {}
    for leaf, roles in experts.layout.roles.items():
        linear: nn.Linear = experts.get_submodule(f"0.{roles[0]}")  # type: ignore[assignment]
        height, columns = linear.weight.shape
        count = experts.count + (experts.identities if leaf != "down_proj" else 0)
        shape = (count, height * len(roles), columns)
        whole = next((n for n in (f"{module}.{leaf}", f"{module}.{leaf}".partition(".")[2]) if n in shapes), None)
        stored = {role: names.get(f"{module}.0.{role}.weight", "") for role in roles}
        places = [
            (names.get(f"{module}.{expert}.{role}.weight") or _other(stored[role], expert), expert, i * height)
            for expert in range(count)
            for i, role in enumerate(roles)
        ]
        if whole is not None and shapes[whole] == shape:
            found[f"{module}.{leaf}"] = StackedParameter(shape=shape, transposed=False, parts=(Part(whole),))
        elif all(shapes.get(n) == (height, columns) for n, _, _ in places):
            parts = tuple(Part(n, expert, first, first + height) for n, expert, first in places)
            found[f"{module}.{leaf}"] = StackedParameter(shape=shape, transposed=False, parts=parts)
    return found


def _other(first: str, expert: int) -> str:
    """The stored name of another expert's weight, by that of the first: experts without use have no module."""
    return re.sub(r"\.experts\.0\.", f".experts.{expert}.", first)


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    count, rows, columns = shape
    return count, rows, columns


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of a stacked parameter: rows of one expert, or all (expert None).

    turns: where gate and up take turns in the file, whose rows the parameter has, in its order: 0 gate's, 1 up's.
    """

    name: str
    expert: int | None = None
    first: int = 0
    last: int = -1
    turns: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class StackedParameter:
    """A stacked parameter [experts, rows, columns]; transposed: it is [experts, in, out]."""

    shape: tuple[int, int, int]
    transposed: bool
    parts: tuple[Part, ...]


def stored_pieces(model: nn.Module, stored: Collection[str]) -> dict[str, Piece]:
    """Name of each matrix and bias of an expert -> the piece of the stored tensor that holds it.

    model: from `skeleton.build` with `split`. stored: names of the checkpoint. Families whose checkpoints hold experts
    one by one have no pieces. Named as servers name single experts: `<container>.experts.<index>.<role>.weight`.
    """
    every = [(name, m) for name, m in moe.split_experts(model) if not conversions.single(model, name)]
    stacked = [f"{name}.{leaf}{suffix}" for name, m in every for leaf in m.layout.roles for suffix in ("", "_bias")]
    tensors = skeleton.found_names(model, stacked, stored) if stacked else {}
    found: dict[str, Piece] = {}
    for name, experts in every:
        for leaf, roles in experts.layout.roles.items():
            for kind, suffix in (("weight", ""), ("bias", "_bias")):
                tensor = tensors.get(f"{name}.{leaf}{suffix}")
                for place, role in enumerate(roles if tensor else ()):
                    found |= _pieces(experts, str(tensor), f"{role}.{kind}", place, len(roles))
    return found


def _pieces(experts: moe.SplitExperts, tensor: str, parameter: str, place: int, count: int) -> dict[str, Piece]:
    """The pieces of one stored tensor that are the same parameter of all experts, by their names."""
    container = tensor.removesuffix(".weight").rpartition(".")[0]
    container += "" if container.rpartition(".")[2] == "experts" else ".experts"
    layout, shape = experts.layout, tuple(experts.get_parameter(f"0.{parameter}").shape)
    run_of_rows = not (layout.stored_interleaved and count > 1) and not (layout.transposed and len(shape) == 2)
    return {
        f"{container}.{index}.{parameter}": Piece(
            stacked=tensor,
            index=index,
            shape=shape,
            first=place * shape[0] if run_of_rows else 0,
            select=None if run_of_rows else partial(layout.cut, place=place, count=count),
        )
        for index in range(experts.count)
    }


def open_split(path: Path, *, trust_remote_code: bool = False) -> tuple[nn.Module, PiecewiseCheckpoint]:
    """The model of a local directory with all experts as Linears, and its tensors with the pieces that these need."""
    model = skeleton.open_model(path, trust_remote_code=trust_remote_code, split=True)
    checkpoint = Checkpoint(path)
    return model, PiecewiseCheckpoint(checkpoint, stored_pieces(model, checkpoint))
