"""What an adapter's settings promise and its file does not hold.

PEFT leaves such modules as they are in the base, and so does the merge. A trainer that lost tensors on saving looks
just so: every missing module is counted, and the first are named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from itertools import chain, zip_longest
from typing import Any

from torch import nn

from requant.adapters import targets
from requant.adapters.config import CONFIG, pattern_value
from requant.adapters.keys import locate, stem, stems
from requant.adapters.peft_directory import Adapter
from requant.adapters.trained_tokens import TrainedTokens
from requant.errors import InputError
from requant.merge.model_layout import ModelLayout
from requant.merge.plan import MergePlan
from requant.modeling import conversions, linears, skeleton
from requant.modeling.blocks import block_list, towers
from requant.modeling.moe import split_experts

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole step of a name
_SHOWN = 4  # names in a message


def missing(adapter: Adapter, plan: MergePlan, model: Any) -> list[str]:
    """A warning for each kind of module that the settings name and the file lacks.

    model: the skeleton of the base. Raises InputError for what no tool could load either: trained copies of whole
    modules, trained tokens and pairs of stacked experts that the settings name.
    """
    trained = [*adapter.folds, *(pair.module for pair in adapter.expert_pairs)]
    known = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    located = partial(_located, plan, model, known, stems(known))
    here = {module: located(module) for module in trained}
    saved = {located(name.rpartition(".")[0]) for name in adapter.replaced}
    notes = []
    untrained_towers = _towers_of_a_text_class(here, model)
    lost = [m for m in _targets(adapter, here, model) if m not in here.values() and not m.startswith(untrained_towers)]
    if lost:
        notes.append(f"{_counted(lost, len(here))}: the settings target them, so their training may be lost")
    _refuse_lost("target_parameters", adapter, _lacking_pairs(adapter, here, ModelLayout.of(model, plan.base)), here)
    _refuse_lost("modules_to_save", adapter, [m for m in _saved_modules(adapter, model) if m not in saved], saved)
    tokens = adapter.config.get("trainable_token_indices")
    if tokens and not any("trainable_tokens_delta" in key for key in adapter.tensors):
        raise InputError(
            f"{adapter.weights}: has no rows of trained tokens, though trainable_token_indices names some: save the "
            "adapter again, or take the setting out if no token was trained"
        )
    extra = untargeted(adapter)
    if extra:
        notes.append(
            f"holds {_named(extra)} that target_modules does not match: merged, though PEFT leaves out what the "
            "settings do not name"
        )
    file = "the adapter's file" if len(plan.adapters) == 1 else f"{adapter.name}/{adapter.weights.name}"
    return [f"{file} {note}" for note in notes]


def _refuse_lost(setting: str, adapter: Adapter, lost: Sequence[str], held: Collection[str]) -> None:
    """Raise InputError for modules that a setting names and the file lacks."""
    if lost:
        raise InputError(
            f"{adapter.weights}: {_counted(lost, len(held))}: {setting} of {CONFIG} names them: their training is "
            f"lost, and PEFT does not load such an adapter: save it again, or take them out of {setting} if they were "
            "not trained"
        )


def check_vocabulary(adapters: Sequence[Adapter], plan: MergePlan, model: Any) -> None:
    """Raise InputError where an adapter gives the two ends of the model vocabularies of different sizes."""
    names = skeleton.tensor_names(model, [op.name for op in plan.ops])
    ops = {op.name: op for op in plan.ops}
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    stored = [names.get(f"{name}.weight") for name, m in model.named_modules() if m is inner or m is outer]
    ends = [ops[name] for name in stored if name in ops]
    resized = any(op.source is not None and op.shape[0] != op.source.shape[0] for op in ends)
    if resized and len({op.shape[0] for op in ends}) > 1:
        shown = ", ".join(f"{op.name} {op.shape[0]} rows" for op in ends)
        raise InputError(
            f"{adapters[0].weights}: resizes one end of the vocabulary alone: {shown} after the merge. Save the "
            "adapter with both embed_tokens and lm_head (save_embedding_layers=True)"
        )


def untrained(adapter: Adapter, modules: Iterable[str]) -> list[str]:
    """Of these modules those that `target_modules` matches and the adapter's file does not hold."""
    held = set(adapter.folds) | {p.module for p in adapter.expert_pairs}
    return [m for m in modules if targets.is_target(adapter.config, m) and m not in held]


def untargeted(adapter: Adapter) -> list[str]:
    """Modules that the adapter's file holds and `target_modules` does not match: PEFT would not load these."""
    if targets.every_linear(adapter.config):
        return []
    config = adapter.config
    modules = [m for m, fold in adapter.folds.items() if not isinstance(fold, TrainedTokens)]
    named = set(targets.targeted_parameters(config, (f"{m}.weight" for m in modules)))
    return [m for m in modules if f"{m}.weight" not in named and not targets.is_target(config, m)]


def _targets(adapter: Adapter, here: Mapping[str, str], model: Any) -> Iterator[str]:
    """The modules of the model that the adapter's settings target.

    here: a module's name in the adapter -> in the model.
    """
    config, trained = adapter.config, _TrainedNames(here)
    if config.get("target_parameters"):
        weights = {trained.of(n): n for n, p in model.named_parameters() if p.ndim == 2}
        yield from (weights[p].removesuffix(".weight") for p in targets.targeted_parameters(config, weights))
    output, ranks = model.get_output_embeddings(), config.get("rank_pattern") or {}
    experts = tuple(f"{name}." for name, _ in split_experts(model))
    single = any(module.startswith(experts) for module in here.values())  # else PEFT had one module for all experts
    for name, module in model.named_modules():
        spelled = trained.of(name)
        if pattern_value(ranks, spelled, None) == 0 or (name.startswith(experts) and not single):
            continue
        if module is output and adapter.ties_weights:
            continue
        if targets.every_linear(config):
            if linears.is_linear(module) and module is not output and not _kept_out(config, spelled):
                yield name
        elif name and _may_be_adapted(module) and targets.is_target(config, spelled):
            yield name


def _towers_of_a_text_class(here: Mapping[str, str], model: Any) -> tuple[str, ...]:
    """Beginnings of the names of towers, where the adapter was trained on the class of the text alone.

    It has nothing in them, and it names the blocks as that class does, without the wrapper's outer names.
    """
    outside, blocks = towers(model), block_list(model)[0]
    if any(name == tower or name.startswith(f"{tower}.") for name in here.values() for tower in outside):
        return ()
    shorter = any(
        name.startswith(f"{blocks}.") and len(m.split(".")) < len(name.split(".")) for m, name in here.items()
    )
    return tuple(f"{tower}." for tower in outside) if shorter else ()


def _lacking_pairs(adapter: Adapter, here: Mapping[str, str], layout: ModelLayout) -> list[str]:
    """Modules of experts with fewer pairs than parameters that `target_parameters` names."""
    trained = _TrainedNames(here)
    spelled = [f"{trained.of(n.rpartition('.')[0])}.{n.rpartition('.')[2]}" for n in layout.fused]
    named = set(targets.targeted_parameters(adapter.config, spelled))
    wanted = Counter(n.rpartition(".")[0] for n, s in zip(layout.fused, spelled, strict=True) if s in named)
    held = Counter(here[pair.module] for pair in adapter.expert_pairs)
    return [module for module, count in wanted.items() if held[module] < count]


def _kept_out(config: Any, module: str) -> bool:
    """Whether "all-linear" leaves this one out: by exclude_modules, layers_to_transform or modules_to_save."""
    return not targets.is_target({**config, "target_modules": [module]}, module)


def _may_be_adapted(module: Any) -> bool:
    """Whether PEFT puts an adapter on modules of this kind: a pattern may match a whole layer's name too."""
    return linears.is_linear(module) or isinstance(module, nn.Embedding)


def _saved_modules(adapter: Adapter, model: Any) -> Iterator[str]:
    """Modules with weights that `modules_to_save` names: by the last letters of their names, as in PEFT."""
    names = adapter.config.get("modules_to_save") or ()
    tied = skeleton.tied_pair(model)
    ends = {n.removesuffix(".weight") for n in tied} if tied else set()
    saved = {stem(name.rpartition(".")[0]) for name in adapter.replaced}
    for name, module in model.named_modules():
        if not name.endswith(tuple(names)) or "weight" not in module._parameters:
            continue
        if name in ends and any(stem(end) in saved for end in ends):
            continue  # one tensor for both
        yield name


class _TrainedNames:
    """Names of the model's modules as they were in training, learned from those that the adapter holds.

    Settings such as a regular expression are about these names.
    """

    def __init__(self, here: Mapping[str, str]) -> None:
        self.alike = {_NUMBER.sub("#", name): trained for trained, name in here.items()}
        self.outer = {
            name.removesuffix(stem(name)): trained.removesuffix(stem(trained))
            for trained, name in here.items()
            if stem(trained) == stem(name)
        }

    def of(self, name: str) -> str:
        """The name in training: that of a module alike in another layer, or with other outer names."""
        alike, numbers = self.alike.get(_NUMBER.sub("#", name)), _NUMBER.findall(name)
        if alike is not None and len(_NUMBER.findall(alike)) == len(numbers):
            return "".join(chain(*zip_longest(_NUMBER.split(alike), numbers, fillvalue="")))
        for inner, outer in self.outer.items():
            if inner and name.startswith(inner):
                return f"{outer}{name.removeprefix(inner)}"
        return name


def _located(plan: MergePlan, model: Any, known: Set[str], known_stems: Mapping[str, set[str]], module: str) -> str:
    """The model's name of a module that the adapter names. known: the model's modules that have parameters."""
    module = plan.renamed_modules.get(module, module)
    if module not in known:
        module = locate(module, known, known_stems)
    if module not in known:
        module = locate(conversions.renamed(model, f"{module}.weight").removesuffix(".weight"), known, known_stems)
    return module


def _counted(lost: Sequence[str], held: int) -> str:
    """`lacks 7 modules (it holds 7): a, b, c, d and 3 more`."""
    return f"lacks {_named(lost).replace(':', f' (it holds {held}):', 1)}"


def _named(modules: Sequence[str]) -> str:
    """`7 modules: a, b, c, d and 3 more`."""
    more = f" and {len(modules) - _SHOWN} more" if len(modules) > _SHOWN else ""
    word = "module" if len(modules) == 1 else "modules"
    return f"{len(modules)} {word}: {', '.join(modules[:_SHOWN])}{more}"
