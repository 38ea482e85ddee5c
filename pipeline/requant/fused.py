"""Where a model's stacked expert parameters are stored: one tensor, or one for each expert and projection.

transformers 5 holds the experts of a layer in one parameter [experts, rows, columns] and makes it, when it loads a
checkpoint, from the tensors of each expert. Which go where is its own conversion table; only the operations that put
tensors side by side are understood here, anything else stays unknown and an adapter on it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from requant.experts import Fused, Piece


def stacked(model: nn.Module, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Fused]:
    """Parameter name -> its places. names: `skeleton.tensor_names`. shapes: of the checkpoint's tensors."""
    parameters = {n: p for n, p in model.named_parameters() if p.ndim == 3}
    if not parameters:
        return {}
    parts = _parts(model, shapes)
    found = {}
    for name, parameter in parameters.items():
        owner = model.get_submodule(name.rpartition(".")[0])
        pieces = (Piece(names[name]),) if name in names else _pieces(parts.get(name, {}), shapes, parameter.shape)
        if pieces:
            count, rows, columns = parameter.shape
            found[name] = Fused((count, rows, columns), bool(getattr(owner, "is_transposed", False)), pieces)
    return found


def _parts(model: nn.Module, stored: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """Parameter name -> source pattern (in order of concatenation) -> stored names, by expert."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [r for r in rules if type(r) is WeightRenaming]
    converters = [r for r in rules if isinstance(r, WeightConverter) and _side_by_side(r)]
    order = {p: list(c.source_patterns) for c in converters for p in c.source_patterns}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, dict[str, list[str]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters)
        if pattern is not None:
            for parameter in {target, prefix + target, target.removeprefix(prefix)}:
                found.setdefault(parameter, {p: [] for p in order[pattern]})[pattern].append(name)
    return found


def _side_by_side(rule: Any) -> bool:
    """Whether a conversion only stacks experts and puts their projections one under the other."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    kinds = [(type(op), op.dim) for op in rule.operations]
    return len(rule.target_patterns) == 1 and kinds in (
        [(MergeModulelist, 0)],
        [(MergeModulelist, 0), (Concatenate, 1)],
    )


def _pieces(
    parts: Mapping[str, list[str]], shapes: Mapping[str, tuple[int, ...]], shape: tuple[int, ...]
) -> tuple[Piece, ...]:
    """One piece for each stored tensor; none unless together they are exactly the parameter."""
    count, rows, columns = shape
    pieces, first = [], 0
    for stored in parts.values():
        heights = {shapes[n] for n in stored}
        if len(stored) != count or len(heights) != 1:
            return ()
        height = heights.pop()
        if len(height) != 2 or height[1] != columns:
            return ()
        pieces += [Piece(n, expert, first, first + height[0]) for expert, n in enumerate(stored)]
        first += height[0]
    return tuple(pieces) if first == rows else ()
