"""What a merge refuses before any work: foreign tensors, adapters that do not add up."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from requant.adapters import expert_order
from requant.adapters.peft_directory import Adapter
from requant.adapters.trained_tokens import TrainedTokens
from requant.checkpoint.reader import TensorInfo
from requant.errors import InputError
from requant.merge.base_weights import BaseWeights
from requant.merge.model_layout import ModelLayout

SHOWN = 3  # names in a message
_SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.(w1|w3|gate_proj|up_proj)$")


def unknown_tensors(base: BaseWeights, layout: ModelLayout) -> None:
    """Raise InputError for tensors of the base that are neither the model's nor known to be of use."""
    unknown = layout.unplaced.unknown
    if not unknown:
        return
    shown = ", ".join(f"{n} {list(base.weights[n].shape)}" for n in unknown[:SHOWN])
    shown = (
        f"{len(unknown)} of its tensors have no place in {layout.model_class}, the class of its config.json: {shown}"
    )
    more = " ..." if len(unknown) > SHOWN else ""
    operations = {layout.converted(name) for name in unknown} - {None}
    if operations:
        raise InputError(
            f"{base.checkpoint.path}: {shown}{more}. transformers makes other tensors of such ones while it loads "
            f"({'; '.join(sorted(map(str, operations)))}), which a merge into the file's own would have to undo: "
            "such a model is not supported"
        )
    raise InputError(
        f"{base.checkpoint.path}: {shown}{more}. Servers would refuse or ignore them: take the config.json that "
        "belongs to these weights, or a copy of the base without these tensors"
    )


def changes_outside_the_model(adapters: Sequence[Adapter], changed: Iterable[str], layout: ModelLayout) -> None:
    """Raise InputError for an adapter that changes tensors which the model class does not train.

    changed: names of the base's tensors.
    """
    parts = layout.unplaced
    outside = {*parts.carried, *parts.recomputed}
    lost = [n for n in changed if n in outside]
    if lost:
        raise InputError(
            f"{paths(adapters)}: changes {len(lost)} tensors of the base that {layout.model_class} with its "
            f"config.json does not train, e.g. {lost[0]}: training had another model: take the config.json "
            "that training used"
        )


def resized_in_parts(adapter: Adapter, module: str, info: TensorInfo, layout: ModelLayout) -> None:
    """Raise InputError for other rows than the base's in a module that its file holds in parts."""
    parts = layout.joins[module]
    rows = sum(map(len, parts.values()))
    if info.shape[0] != rows:
        held = ", ".join(f"{layout.tensor(part)} {len(own)}" for part, own in parts.items())
        raise InputError(
            f"{adapter.path}: {module} has {info.shape[0]} rows, the base's {rows}, which its file holds as {held}: "
            "to which of these the new ones belong is not said: train without new tokens"
        )


def shared_weights(adapters: Sequence[Adapter], changed: Collection[str], layout: ModelLayout) -> None:
    """Raise InputError for an adapter on weights that layers share: it changes each on its own, or one alone.

    changed: names of the base's tensors.
    """
    shared = {
        name: first
        for name, first in layout.shared.items()
        if first != layout.embedding and not {name, layout.tensor(first)}.isdisjoint(changed)
    }
    if shared:
        name, first = next(iter(shared.items()))
        raise InputError(
            f"{paths(adapters)}: changes {len(shared)} weights that layers share, e.g. {name}, which is {first}: the "
            "file holds one matrix for both, and training gave each a change of its own or one alone, which no "
            f"checkpoint of {layout.model_class} can hold: train with these modules left out of target_modules"
        )


def combinations(adapters: Sequence[Adapter]) -> None:
    """Raise InputError for several adapters whose changes do not add up.

    They add up only if all of them are plain sums; PEFT has no meaning for the rest either.
    """
    if len(adapters) == 1 and adapters[0].weight == 1:
        return
    for adapter in adapters:
        why = _why_not_a_sum(adapter)
        if why:
            raise InputError(f"{adapter.path}: this adapter {why}; only plain LoRA can be weighted or added to another")


def _why_not_a_sum(adapter: Adapter) -> str | None:
    """Why an adapter's change is not a delta that can be added to another; None: it is one."""
    config = adapter.config
    if config.get("peft_type") != "LORA":
        return f"is {config.get('peft_type')}"
    if config.get("use_dora"):
        return "is DoRA: its norms depend on the other adapters"
    if adapter.replaced:
        return f"replaces {next(iter(adapter.replaced))} of the base"
    if any(isinstance(f, TrainedTokens) for f in adapter.folds.values()):
        return "has trained tokens, which replace rows of the base"
    return None


def paths(adapters: Sequence[Adapter]) -> str:
    """The adapters' directories, for a message."""
    return ", ".join(str(a.path) for a in adapters)


def recorded_bases(adapters: Sequence[Adapter], before: str = "") -> str:
    """Sentence, for the end of a message, on the base that adapter_config.json records; empty where none does."""
    names = dict.fromkeys(a.base_name for a in adapters if a.base_name)
    return f"{before} adapter_config.json names {', '.join(names)}" if names else ""


def warnings(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """In what order experts are read; where PEFT itself is wrong, so that comparing with it will show a difference."""
    wrong = [a for a in adapters if a.config.get("use_rslora") and any(_SINGLE_EXPERT.search(m) for m in a.folds)]
    pefts = (
        f"{a.name}: PEFT 0.21 applies rsLoRA on fused experts sqrt(2) times too strongly: the merge does not, so "
        "it will differ from the variant adapter"
        for a in wrong
    )
    return (*expert_order.sentences(adapters), *pefts)


def open_expert_orders(adapters: Sequence[Adapter]) -> None:
    """Raise InputError for an adapter whose experts are in an order that no one has said or measured."""
    for adapter in filter(expert_order.is_open, adapters):
        raise InputError(
            f"{adapter.path}: {expert_order.written_by_unsloth(adapter)} names unsloth, and whether lora_B of its "
            f"experts is in PEFT's order or unsloth's is not known: give load() an {expert_order.KEY}, or let a run "
            "measure it"
        )
