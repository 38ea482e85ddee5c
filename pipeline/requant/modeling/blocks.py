"""The transformer blocks of a model and their linears, found by structure, not tabulated."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from inspect import signature
from typing import Any

from torch import nn

from requant.errors import InputError
from requant.modeling import linears

_CROSS = re.compile(r"(.*\.)?(cross|encoder)_?att(n|ention)")  # last part: an attention between two sequences
_Signature = tuple[tuple[str, tuple[int, ...]], ...]  # names and shapes of a block's parameters


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, blocks) of the text decoder: the largest list of modules beside the input embedding.

    Towers for images and sound have lists of their own, and a hybrid's blocks are of several classes: the embedding of
    tokens tells which list reads text. Lists inside of a block (experts) do not count. Raises InputError without one.
    """
    embedding = _name_of(model, "get_input_embeddings")
    senses = tuple(f"{n}." for n, m in model.named_modules() if _reads_no_text(m) and not embedding.startswith(n))
    lists = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) and not name.startswith(senses)
    ]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    owner = embedding.rpartition(".")[0]
    while True:
        inside = [(n, m) for n, m in outer if not owner or n.startswith(f"{owner}.")]
        if inside:  # a list beside the embedding, before one inside of a module beside it
            beside = [item for item in inside if item[0].rpartition(".")[0] == owner]
            return max(beside or inside, key=lambda item: sum(p.numel() for p in item[1].parameters()))
        if not owner:
            raise InputError(f"{type(model).__name__}: no list of transformer blocks found")
        owner = owner.rpartition(".")[0]


def why_not_text(model: Any) -> str | None:
    """Why text alone says nothing about the blocks of a model; None: it does."""
    config = model.config.get_text_config()
    _, blocks = block_list(model)
    causal = any(getattr(m, "is_causal", False) for block in blocks for m in block.modules())
    if getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention") and not causal:
        return "it is an encoder, which reads in both directions (config.json: is_decoder is not true)"
    if "prev_attn_output" in signature(blocks[0].forward).parameters:
        return "its blocks are reversible: each takes two streams, and quantizing walks along one"
    if all(waits_for_an_encoder(block) for block in blocks):
        return "every block attends to the output of an encoder, and text alone has none"
    return None


def _reads_no_text(module: Any) -> bool:
    """Whether a module is a model of transformers whose input is images or sound."""
    return getattr(module, "main_input_name", "input_ids") in ("pixel_values", "input_features", "input_values")


def waits_for_an_encoder(block: nn.Module) -> bool:
    """Whether a block attends to an encoder's output, so that models skip it on text alone."""
    return any(_CROSS.fullmatch(name) for name, _ in block.named_modules())


def _name_of(model: Any, getter: str) -> str:
    """Name of the module that a method of the class returns; empty where the class does not tell."""
    try:
        wanted = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return ""
    return next((name for name, module in model.named_modules() if module is wanted), "")


def towers(model: nn.Module) -> tuple[str, ...]:
    """The outermost modules with linears that are no part of the text decoder: towers and projectors of a wrapper."""
    blocks = block_list(model)[0]
    ends = {_name_of(model, "get_input_embeddings"), _name_of(model, "get_output_embeddings")}
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        if linears.is_linear(module) and not name.startswith(f"{blocks}.") and name not in ends:
            steps = name.split(".")
            outer = (".".join(steps[:i]) for i in range(1, len(steps) + 1))
            found[next(o for o in outer if not f"{blocks}.".startswith(f"{o}."))] = None
    return tuple(found)


def block_linears(block: nn.Module) -> dict[str, Any]:
    """Every Linear of a block by its name inside the block."""
    return {name: m for name, m in block.named_modules() if linears.is_linear(m)}


def kinds(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The first block of each kind, the most frequent kind first: a hybrid has several, of other linears each."""
    first: dict[_Signature, nn.Module] = {}
    counts: Counter[_Signature] = Counter()
    for block in blocks:
        first.setdefault(_signature(block), block)
        counts[_signature(block)] += 1
    return [first[found] for found, _ in counts.most_common()]


def samples(blocks: Iterable[nn.Module], most: int = 3) -> list[tuple[int, float]]:
    """(index of a block, how many blocks it stands for) of the `most` most frequent kinds.

    Blocks of rarer kinds count to the first of these, by their numbers of parameters.
    """
    every = list(blocks)
    signatures = [_signature(block) for block in every]
    found = [[i for i, s in enumerate(signatures) if s == _signature(kind)] for kind in kinds(every)]  # indices by kind
    middle = len(every) // 2
    chosen = [(min(of, key=lambda i: abs(i - middle)), float(len(of))) for of in found[:most]]
    rest = sum(_count(every[i]) for of in found[most:] for i in of) / max(_count(every[chosen[0][0]]), 1)
    return [(chosen[0][0], chosen[0][1] + rest), *chosen[1:]]


def _count(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


def _signature(block: nn.Module) -> _Signature:
    """Names and shapes of a block's parameters."""
    return tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
