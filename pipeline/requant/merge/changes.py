"""What all adapters of a merge change; embeddings that this unties."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from requant.adapters.fold import Fold
from requant.adapters.trained_tokens import TrainedTokens
from requant.checkpoint.reader import TensorInfo, read_tensor
from requant.merge.base_weights import BaseWeight
from requant.merge.model_layout import ModelLayout


@dataclass
class Changes:
    """What all adapters change, by the checkpoint's tensor names."""

    folds: dict[str, list[Fold]] = field(default_factory=dict)
    bias_folds: dict[str, list[Fold]] = field(default_factory=dict)
    replaced: dict[str, TensorInfo] = field(default_factory=dict)
    renamed_modules: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.folds) + len(self.bias_folds) + len(self.replaced)

    def __contains__(self, name: str) -> bool:
        return name in self.folds or name in self.replaced


def untie(
    layout: ModelLayout, sources: dict[str, BaseWeight], changes: Changes, *, tie_on_purpose: bool
) -> tuple[bool, dict[str, BaseWeight]]:
    """(whether tied embeddings become two tensors, the sources of the output tensors).

    They become two tensors where the adapter makes them differ.
    """
    if layout.tied is None:
        return False, sources
    inner, outer = layout.tensor(layout.tied[0]), layout.tied[1]
    stored = layout.names.get(outer)
    if stored is not None and stored != inner and stored in sources:
        sources = {n: w for n, w in sources.items() if n != stored}  # a redundant copy of a tied head
    if inner not in changes and outer not in changes:
        return False, sources
    folds, replaced = changes.folds, changes.replaced
    if _same_rows(folds.get(inner, []), folds.get(outer, [])) and inner not in replaced and outer not in replaced:
        folds.pop(outer, None)
        return False, sources
    both = inner in replaced and outer in replaced
    folded = inner in folds or outer in folds
    same = both and not folded and torch.equal(read_tensor(replaced[inner]), read_tensor(replaced[outer]))
    if same or tie_on_purpose:
        if outer in folds:
            folds.setdefault(inner, folds.pop(outer))
        if outer in replaced:
            replaced.setdefault(inner, replaced.pop(outer))
        return False, sources
    _share_rows(folds, inner, outer)
    return True, sources | {outer: sources[inner]}


def _share_rows(folds: dict[str, list[Fold]], inner: str, outer: str) -> None:
    """Give the head the embedding's trained tokens before its own folds: PEFT keeps these rows tied."""
    shared = [f for f in folds.get(inner, []) if isinstance(f, TrainedTokens)]
    if shared and not any(isinstance(f, TrainedTokens) for f in folds.get(outer, [])):
        folds[outer] = [*shared, *folds.get(outer, [])]


def _same_rows(inner: list[Fold], outer: list[Fold]) -> bool:
    """Whether a tied pair changes by trained tokens alone, the same at both ends.

    PEFT keeps these tied.
    """
    if len(inner) != 1 or len(outer) > 1:
        return False
    (one,), (other,) = inner, outer or inner
    if not isinstance(one, TrainedTokens) or not isinstance(other, TrainedTokens) or one.indices != other.indices:
        return False
    return torch.equal(read_tensor(one.rows), read_tensor(other.rows))
