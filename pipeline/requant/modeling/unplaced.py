"""Stored tensors that are no parameter of the model class, and what becomes of each.

Files hold more than the class has: buffers that every loader recomputes, heads for multi-token prediction, layers past
the last. A structure decides where the class has the buffer, name and shape where it has not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from requant.modeling import conversions, skeleton
from requant.modeling.blocks import block_list
from requant.modeling.moe import split_experts

Kind = Literal["state", "recomputed", "carried", "unknown"]
Shape = tuple[int, ...]


def _square(shape: Shape) -> bool:
    """A mask [..., n, n] whose leading dimensions are 1."""
    return len(shape) >= 2 and shape[-1] == shape[-2] and all(n == 1 for n in shape[:-2])


def _vector(shape: Shape) -> bool:
    return len(shape) == 1


def _single(shape: Shape) -> bool:
    return all(n == 1 for n in shape)


def _row(shape: Shape) -> bool:
    return bool(shape) and _single(shape[:-1])


def _table(shape: Shape) -> bool:
    return len(shape) >= 2


# What older releases stored of a model's class: (name, its shape). Every loader computes it from the config.
_RECOMPUTED: tuple[tuple[re.Pattern[str], Callable[[Shape], bool]], ...] = (
    (re.compile(r"(.*\.)?(\w+_)?inv_freq"), _vector),
    (re.compile(r"(.*\.)?\w*(rotary|rope)\w*\.(\w+_)?(cos|sin)(_\w+)?"), _table),
    (re.compile(r"(.*\.)?\w*(attn|attention)\.(bias|mask|causal_mask|attn_mask)"), _square),
    (re.compile(r"(.*\.)?\w*masked_bias"), _single),
    (re.compile(r"(.*\.)?position_ids"), _row),
    (re.compile(r"(.*\.)?rope\.freqs"), _vector),
    (re.compile(r"(.*\.)?(version|_float_tensor)"), _single),
)
_PREDICTION_HEAD = re.compile(r"(.*_)?(mtp|nextn)(_.*)?")  # one part of a name


@dataclass(frozen=True, kw_only=True)
class Unplaced:
    """Names of the stored tensors that are no parameter of the model, by what becomes of them.

    state: buffers that the class loads, written as they are. recomputed: buffers that every loader computes: dropped.
    carried: parts that the class leaves out and servers may run (multi-token prediction, layers past the last): copied.
    unknown: the rest. roots: modules that hold carried tensors and nothing else.
    """

    state: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """Root -> number of its tensors."""
        return {r: sum(name == r or name.startswith(f"{r}.") for name in self.carried) for r in self.roots}

    @property
    def carried_line(self) -> str:
        """The roots and their numbers of tensors, for a message."""
        return ", ".join(f"{root} ({count} tensors)" for root, count in self.counts.items())

    @classmethod
    def of(cls, model: nn.Module, stored: Mapping[str, Shape], placed: Collection[str] = ()) -> Unplaced:
        """Those of a checkpoint. stored: name -> shape. placed: names known to be of parameters."""
        names = skeleton.tensor_names(model, stored)
        used = {*names.values(), *placed}
        kinds = _Kinds(model, names)
        found: dict[Kind, list[str]] = {"state": [], "recomputed": [], "carried": [], "unknown": []}
        for name, shape in stored.items():
            if name not in used:
                found[kinds.of(name, shape)].append(name)
        others = used | set(found["state"])
        return cls(
            state=tuple(found["state"]),
            recomputed=tuple(found["recomputed"]),
            carried=tuple(found["carried"]),
            unknown=tuple(found["unknown"]),
            roots=tuple(roots(found["carried"], others)),
        )


class _Kinds:
    """Decides what a stored tensor is that no parameter is stored as."""

    def __init__(self, model: Any, names: Mapping[str, str]) -> None:
        self.model, (prefix, blocks) = model, block_list(model)
        self.count = len(blocks)
        self.prefixes = {prefix, *_spellings(prefix, names)}
        self.ignored = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        self.kept, self.computed = buffer_names(model)
        self.identities = tuple(  # experts that return their input: transformers saves weights of them all the same
            f"{name}.{m.count + i}." for name, m in split_experts(model) for i in range(m.identities)
        )

    def of(self, name: str, shape: Shape) -> Kind:
        spelled = skeleton.spellings(self.model, conversions.renamed(self.model, name))
        if any(n in self.kept for n in spelled):
            return "state"
        if any(n in self.computed for n in spelled):
            return "recomputed"
        if any(pattern.fullmatch(name) and fits(shape) for pattern, fits in _RECOMPUTED):
            return "recomputed"
        if any(n.startswith(self.identities) for n in spelled):
            return "carried"
        if self._past_the_last(name) or any(_PREDICTION_HEAD.fullmatch(part) for part in name.split(".")):
            return "carried"
        return "carried" if any(pattern.search(name) for pattern in self.ignored) else "unknown"

    def _past_the_last(self, name: str) -> bool:
        """Whether a tensor is of a block beyond those that the config counts."""
        for prefix in self.prefixes:
            number = name.removeprefix(f"{prefix}.").partition(".")[0] if name.startswith(f"{prefix}.") else ""
            if number.isdecimal() and int(number) >= self.count:
                return True
        return False


def _spellings(prefix: str, names: Mapping[str, str]) -> Iterator[str]:
    """The blocks' prefix as the checkpoint spells it."""
    for parameter, stored in names.items():
        inner = parameter.removeprefix(prefix)
        if inner != parameter and stored.endswith(inner):
            yield stored.removesuffix(inner)


def buffer_names(model: nn.Module) -> tuple[set[str], set[str]]:
    """(buffers that a checkpoint of this class holds, buffers that the class computes), by full name."""
    kept, computed = set[str](), set[str]()
    for prefix, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                into = computed if leaf in module._non_persistent_buffers_set else kept
                into.add(f"{prefix}.{leaf}" if prefix else leaf)
    return kept, computed


def recomputed_by_name(name: str) -> bool:
    """Whether a buffer of this name is one that every loader computes."""
    return any(pattern.fullmatch(name) for pattern, _ in _RECOMPUTED)


def roots(names: Collection[str], others: Collection[str]) -> Iterator[str]:
    """The shortest modules that hold these tensors and none of `others`."""
    shared = {name[:i] for name in others for i, letter in enumerate(name) if letter == "."}
    seen = set[str]()
    for name in names:
        parts = name.split(".")
        heads = (".".join(parts[:i]) for i in range(1, len(parts)))
        root = next((head for head in heads if head not in shared), name)
        if root not in seen:
            seen.add(root)
            yield root
