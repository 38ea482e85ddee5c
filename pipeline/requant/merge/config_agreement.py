"""Whether the base's weights are those of the model that its config.json describes."""

from __future__ import annotations

import re
from typing import Any

import torch

from requant.errors import InputError
from requant.merge.base_weights import BaseWeights
from requant.merge.model_layout import ModelLayout
from requant.modeling import skeleton
from requant.modeling.unplaced import buffer_names, recomputed_by_name

_SHOWN = 3  # names in a message


def check(base: BaseWeights, model: Any, layout: ModelLayout) -> None:
    """Raise InputError where a tensor of the model is not in the base, or has another shape or a second value there.

    model: the skeleton of the base, made of config.json.
    """
    weights = base.weights
    stored = skeleton.tensor_names(model, weights)
    missing = set(skeleton.unstored(model, stored))
    conv1d = {f"{name}.weight" for name in skeleton.conv1d_modules(model)}
    stacks = {n.rpartition(".")[0] for n, stack in layout.fused.items() if stack.parts[0].expert is None}
    problems = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        expected = tuple(parameter.shape)[:: -1 if name in conv1d else 1]
        if name in missing and any(name.startswith(f"{module}.") for module in stacks):
            continue  # of experts that are stored in one tensor
        if name in missing:
            problems.append(f"{name} {list(expected)} is missing")
        elif name in stored and weights[stored[name]].shape != expected:
            problems.append(f"{stored[name]} is {list(weights[stored[name]].shape)} instead of {list(expected)}")
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise InputError(
            f"{base.checkpoint.path}: config.json does not describe these weights: {'; '.join(problems[:_SHOWN])}"
            f"{more}. Take the config.json that belongs to them, or download the model again"
        )
    _check_ties(base, model)


def lacking_buffers(base: BaseWeights, model: Any) -> list[str]:
    """A warning where the base lacks buffers with trained values, such as a router's bias, that the model loads."""
    kept = {name for name in buffer_names(model)[0] if not recomputed_by_name(name)}
    ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    stored = skeleton.found_names(model, kept, base.weights)
    lacking = sorted(n for n in kept - stored.keys() if not any(pattern.search(n) for pattern in ignored))
    if not lacking:
        return []
    return [
        f"{base.checkpoint.path}: lacks {len(lacking)} of the buffers that {type(model).__name__} loads, e.g. "
        f"{lacking[0]}: transformers starts without their trained values, and servers may refuse the model; a tool "
        "that saved this base may have lost them: compare with the original's list of tensors"
    ]


def _check_ties(base: BaseWeights, model: Any) -> None:
    """Raise InputError for two different matrices where config.json says that both ends are one.

    transformers 4 takes the embedding for both, transformers 5 each its own. A copy with the same values is fine.
    """
    tied = skeleton.tied_pair(model)
    names = skeleton.tensor_names(model, base.weights)
    inner, outer = (names.get(end) for end in tied) if tied else (None, None)
    if inner is None or outer is None or inner == outer or torch.equal(base.read(inner), base.read(outer)):
        return
    raise InputError(
        f"{base.checkpoint.path}: config.json says tie_word_embeddings, but {outer} has other values than {inner}: "
        "which one did training see? Set tie_word_embeddings to false in config.json if it was the head, as with "
        "transformers 5, or take the base without it"
    )
