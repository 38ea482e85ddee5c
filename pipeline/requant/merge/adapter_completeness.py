"""What an adapter's settings promise and its file does not hold.

PEFT leaves such modules as they are in the base, and so does the merge. A trainer that lost tensors on saving looks
just so: every missing module is counted, and the first are named.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from requant.adapters import targets
from requant.adapters.config import pattern_value
from requant.adapters.keys import locate, stem, stems
from requant.adapters.peft_directory import Adapter
from requant.errors import InputError
from requant.merge.plan import MergePlan
from requant.modeling import linears, skeleton
from requant.modeling.moe import split_experts

_SHOWN = 4  # names in a message


def missing(adapter: Adapter, plan: MergePlan, model: Any) -> list[str]:
    """A warning for each kind of module that the settings name and the adapter's file lacks.

    model: the skeleton of the base.
    """
    held = {plan.renamed_modules.get(m, m) for m in adapter.folds}
    held |= {plan.renamed_modules.get(p.module, p.module) for p in adapter.expert_pairs}
    saved = {_located(adapter, plan, name.rpartition(".")[0]) for name in adapter.replaced}
    notes = []
    lost = [m for m in _targets(adapter, plan, model, held) if m not in held]
    if lost:
        notes.append(f"{_counted(lost, len(held))}: target_modules matches them, so their training may be lost")
    lost = [m for m in _saved_modules(adapter, model) if m not in saved]
    if lost:
        notes.append(f"{_counted(lost, len(saved))}: modules_to_save names them, so their training may be lost")
    tokens = adapter.config.get("trainable_token_indices")
    if tokens and not any("trainable_tokens_delta" in key for key in adapter.tensors):
        notes.append("has no rows of trained tokens, though trainable_token_indices names some")
    return [f"the adapter's file {note}" for note in notes]


def check_vocabulary(adapters: Sequence[Adapter], plan: MergePlan, model: Any) -> None:
    """Raise InputError where an adapter gives the two ends of the model vocabularies of different sizes."""
    names = skeleton.tensor_names(model, [op.name for op in plan.ops])
    rows = {op.name: op.shape[0] for op in plan.ops}
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [names.get(f"{name}.weight") for name, m in model.named_modules() if m is inner or m is outer]
    sizes = {name: rows[name] for name in ends if name in rows}
    if len(set(sizes.values())) > 1 and plan.vocab_size is not None:
        shown = ", ".join(f"{name} {count} rows" for name, count in sizes.items())
        raise InputError(
            f"{adapters[0].weights}: resizes one end of the vocabulary alone: {shown} after the merge. Save the adapter "
            "with both embed_tokens and lm_head (save_embedding_layers=True)"
        )


def untrained(adapter: Adapter, modules: Iterable[str]) -> list[str]:
    """Of these modules those that `target_modules` matches and the adapter's file does not hold."""
    held = set(adapter.folds) | {p.module for p in adapter.expert_pairs}
    return [m for m in modules if targets.is_target(adapter.config, m) and m not in held]


def _targets(adapter: Adapter, plan: MergePlan, model: Any, held: Collection[str]) -> Iterator[str]:
    """The modules of the base that the adapter's settings target."""
    config = adapter.config
    parameters = [n for n, p in model.named_parameters() if p.ndim >= 2]
    for parameter in targets.targeted_parameters(config, (_as_trained(adapter, plan, n) for n in parameters)):
        yield _located(adapter, plan, parameter.rpartition(".")[0])
    output, ranks = model.get_output_embeddings(), config.get("rank_pattern") or {}
    experts = tuple(f"{name}." for name, _ in split_experts(model))
    single = any(module.startswith(experts) for module in held)  # else PEFT had one module for all experts
    for name, module in model.named_modules():
        trained = _as_trained(adapter, plan, name)
        if pattern_value(ranks, trained, None) == 0 or (name.startswith(experts) and not single):
            continue
        if module is output and adapter.ties_weights:
            continue
        if targets.every_linear(config):
            if linears.is_linear(module) and module is not output and not _kept_out(config, trained):
                yield name
        elif name and _may_be_adapted(module) and targets.is_target(config, trained):
            yield name


def _kept_out(config: Any, module: str) -> bool:
    """Whether "all-linear" leaves this one out: by exclude_modules, layers_to_transform or modules_to_save."""
    return not targets.is_target({**config, "target_modules": [module]}, module)


def _may_be_adapted(module: Any) -> bool:
    """Whether PEFT puts an adapter on modules of this kind: a pattern may match a whole layer's name too."""
    return linears.is_linear(module) or type(module).__name__ == "Embedding"


def _saved_modules(adapter: Adapter, model: Any) -> Iterator[str]:
    """Modules with weights that `modules_to_save` names: by the end of their names."""
    names = adapter.config.get("modules_to_save") or ()
    tied = skeleton.tied_pair(model)
    ends = {n.removesuffix(".weight") for n in tied} if tied else set()
    saved = {stem(name.rpartition(".")[0]) for name in adapter.replaced}
    for name, module in model.named_modules():
        if not any(name == n or name.endswith(f".{n}") for n in names) or "weight" not in module._parameters:
            continue
        if name in ends and any(stem(end) in saved for end in ends):
            continue  # one tensor for both
        yield name


def _as_trained(adapter: Adapter, plan: MergePlan, name: str) -> str:
    """A module's or parameter's name with the outer names that the model had in training.

    Settings such as a regular expression are about these names.
    """
    for trained, here in plan.renamed_modules.items():
        if stem(trained) == stem(here) and trained in {*adapter.folds, *(p.module for p in adapter.expert_pairs)}:
            inner, outer = here.removesuffix(stem(here)), trained.removesuffix(stem(trained))
            return f"{outer}{name.removeprefix(inner)}" if inner and name.startswith(inner) else name
    return name


def _located(adapter: Adapter, plan: MergePlan, module: str) -> str:
    """The base's name of a module that the adapter names."""
    known = {name.rpartition(".")[0] for name in plan.base.weights}
    found = plan.renamed_modules.get(module) or locate(module, known, stems(known))
    return found


def _counted(lost: Sequence[str], held: int) -> str:
    """`lacks 7 modules (it holds 7): a, b, c and 4 more`."""
    more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    word = "module" if len(lost) == 1 else "modules"
    return f"lacks {len(lost)} {word} (it holds {held}): {', '.join(lost[:_SHOWN])}{more}"
