"""transformers' renamings and conversions of a checkpoint's tensors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from requant.modeling import cut_linears, moe


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertRule:
    """A weight of single experts in the file, and the modules of the class that hold these experts.

    pattern: of the stored name; its group is the expert's number. stems: last parts of the modules' names. Where there
    are several, the file counts through all of them: the first `each` experts are the first module's.
    """

    pattern: re.Pattern[str]
    stems: tuple[str, ...]
    role: str
    each: int = 0

    def apply(self, name: str) -> str:
        """A stored name as the model with single experts calls it."""
        return self.pattern.sub(self._place, name)

    def _place(self, match: re.Match[str]) -> str:
        number, group = int(match[1]), 0
        if len(self.stems) > 1 and self.each:
            group, number = divmod(number, self.each)
        return f"{self.stems[group]}.{number}.{self.role}.weight" if group < len(self.stems) else match[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversions:
    """What transformers does with the tensors of a checkpoint while it loads one model."""

    renamings: Sequence[Any]
    experts: Sequence[ExpertRule]
    converters: Sequence[Any]

    def current(self, name: str) -> str:
        """The name after the renamings, before the conversions."""
        for rule in self.renamings:
            name = rule.rename_source_key(name)[0]
        return name


def of(model: nn.Module) -> Conversions:
    """transformers' rules for a model, found once, before its experts are split."""
    found: Conversions | None = getattr(model, "_requant_conversions", None)
    if found is None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        every = get_model_conversion_mapping(model, add_legacy=False)
        converters = [rule for rule in every if isinstance(rule, WeightConverter)]
        found = Conversions(
            renamings=[rule for rule in every if isinstance(rule, WeightRenaming)],
            experts=[rule for converter in converters for rule in _expert_rules(model, converter)],
            converters=converters,
        )
        model._requant_conversions = found  # type: ignore[assignment]
    return found


def _expert_rules(model: nn.Module, converter: Any) -> list[ExpertRule]:
    """The weights of single experts that a conversion stacks.

    Which one is the gate is read off it too: [gate, up] in this order.
    """
    operations = [type(op).__name__ for op in converter.operations]
    if operations[0] not in ("MergeModulelist", "ErnieFuseAndSplitTextVisionExperts"):
        return []
    places = [target.rpartition(".") for target in converter.target_patterns]
    fused = operations in (["MergeModulelist", "Concatenate"], ["ErnieFuseAndSplitTextVisionExperts"])
    roles = moe.ROLES[:2] if fused and places[0][2] == "gate_up_proj" else (places[0][2],)
    return [
        ExpertRule(
            pattern=re.compile(re.escape(source.replace("\\", "")).replace(r"\*", r"(\d+)")),
            stems=tuple(stem for stem, _, _ in places),
            role=role,
            each=_experts_of(model, converter.target_patterns[0]) if len(places) > 1 else 0,
        )
        for source, role in zip(converter.source_patterns, roles, strict=True)
    ]


def _experts_of(model: nn.Module, stacked: str) -> int:
    """The number of experts in the stacked parameters whose names end so; 0 without one."""
    return next((p.shape[0] for name, p in model.named_parameters() if name.endswith(f".{stacked}")), 0)


def renamed(model: nn.Module, name: str) -> str:
    """A checkpoint's tensor name as the model of today calls it."""
    rules = of(model)
    name = rules.current(name)
    for rule in rules.experts:
        name = rule.apply(name)
    for rule in rules.converters:
        if is_transposed(rule) or is_interleaved(rule) or is_halved(rule):
            name, pattern = rule.rename_source_key(name)
            if pattern is not None:
                return name + cut_linears.JOINED if is_halved(rule) else name
    return cut_linears.renamed(name, cut_linears.rules(rules.converters))


def is_transposed(rule: Any) -> bool:
    """Whether a conversion transposes one matrix and does nothing else."""
    operations = [(type(op).__name__, getattr(op, "dim0", None), getattr(op, "dim1", None)) for op in rule.operations]
    return len(rule.source_patterns) == len(rule.target_patterns) == 1 and operations == [("Transpose", 0, 1)]


def is_interleaved(rule: Any) -> bool:
    """Whether a conversion sorts one stack, whose rows are of gate and up in turns, and does nothing else."""
    return len(rule.source_patterns) == len(rule.target_patterns) == 1 and cut_linears.steps(rule) == [
        ("Interleave", 1)
    ]


def is_halved(rule: Any) -> bool:
    """Whether a conversion makes two stacks, parameters of one module, of one whose rows are theirs in turns."""
    two = len(rule.source_patterns) == 1 and len(rule.target_patterns) == 2 and "." not in "".join(rule.target_patterns)
    return two and cut_linears.steps(rule) == [("Interleave", 1), ("Chunk", 1)]


def converted(model: nn.Module, name: str) -> str | None:
    """What transformers does with a stored tensor besides renaming it, such as "Chunk"; None: nothing."""
    current = of(model).current(name)
    for rule in of(model).converters:
        if rule.rename_source_key(current)[1] is not None:
            return ", ".join(type(operation).__name__ for operation in rule.operations)
    return None


def single(model: nn.Module, name: str) -> bool:
    """Whether the family's checkpoints hold the experts of this module one by one."""
    return name.endswith(tuple(stem for rule in of(model).experts for stem in rule.stems))
