"""Traits of a plan that some engine cannot load, and how engines group its linears."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from requant.deploy.engine_targets import Trait
from requant.deploy.gguf_families import family_of
from requant.errors import InputError
from requant.modeling import linears
from requant.modeling.cut_linears import JOINED
from requant.modeling.families import BY_INPUTS, EXPERT, expert_groups, fused_groups
from requant.numerics.grid import Grid
from requant.quantize.plan import Plan

_LATENT = (".q_a_proj", ".kv_a_proj_with_mqa", ".kv_b_proj")
# optimum 2.3 gptq/constants.py BLOCK_PATTERNS, of causal language models.
_BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers", "model.language_model.layers")


def traits(plan: Plan, model: nn.Module) -> dict[Trait, str]:
    """Trait that the plan has -> an example of it."""
    modules = {name: model.get_submodule(name) for name in plan.grids}
    by_grid: dict[tuple[int, int, bool], list[str]] = {}
    for name, grid in plan.grids.items():
        by_grid.setdefault((grid.bits, grid.group_size, grid.symmetric), []).append(name)
    rarest = min(by_grid.values(), key=len)
    found: dict[Trait, list[str]] = {
        "conv1d": [n for n, m in modules.items() if type(m) is linears.TransposedLinear],
        "linear-like": [
            type(m).__name__ for m in modules.values() if type(m) not in (nn.Linear, linears.TransposedLinear)
        ],
        "experts": [n for n in modules if EXPERT.fullmatch(n)],
        "renamed": _renamed(plan, model),
        "fused gate_up": [n for n in modules if n.endswith(".gate_up_proj")],
        "overrides": rarest if len(by_grid) > 1 else [],
        "asymmetric overrides": rarest if len(by_grid) > 1 and not all(symmetric for *_, symmetric in by_grid) else [],
        "skipped in some blocks": plan.partly_left,
        "unlike fused parts": [
            f"the parts of {fused}" for fused, _, same in groups(plan) if not same and ".experts." not in fused
        ],
        "unlike experts": [n for n, same in experts(plan).items() if not same],
        "blocks elsewhere": [] if plan.prefix in _BLOCKS else [plan.prefix],
        "experts in 16 bit": experts_left(plan),
        "experts in 16 bit of other sizes": [
            f"{n} {list(shape)}" for n, shape in _left_shapes(plan, model) if not _marlin_fits(plan, shape)
        ],
        "latent attention": [n for n in modules if n.endswith(_LATENT)],
        "kv_b_proj": [n for n in modules if n.endswith(_LATENT[-1])],
        "towers": list(plan.towers),
        "not in GGUF": _not_in_gguf(model),
        "quantized embeddings": [n for n in plan.ends if n not in plan.outside],
        "cut while loading": [plan.renamed.get(n, n) for n in modules if n.endswith(JOINED)],
        "quantized head": [n for n in plan.ends if n in plan.outside],
    }
    return {trait: examples[0] for trait, examples in found.items() if examples}


def _not_in_gguf(model: Any) -> list[str]:
    """Why a model is not written as GGUF."""
    try:
        family_of(model.config, "")
    except InputError as error:
        return [str(error).removeprefix(": ")]
    return []


def experts_left(plan: Plan) -> list[str]:
    """The experts that stay in 16 bit, all of a layer's: containers, or modules that are not split."""
    quantized = expert_groups(plan.grids)
    return [*plan.fused, *(name for name in expert_groups(plan.left) if name not in quantized)]


def _left_shapes(plan: Plan, model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """(container, [expert width, model width]) of experts in 16 bit whose matrices are known."""
    for container, names in expert_groups(plan.left).items():
        first = next((n for n in names if n.rpartition(".")[2] not in BY_INPUTS), names[0])
        module: Any = model.get_submodule(first)
        if container in experts_left(plan):
            yield container, (module.out_features, module.in_features)


def _marlin_fits(plan: Plan, shape: tuple[int, int]) -> bool:
    """vLLM's `check_moe_marlin_supports_config`, asked before its rules are."""
    group = next(iter(Counter(g.group_size for g in plan.grids.values()).most_common(1)), (-1, 0))[0]
    return shape[1] % 128 == 0 and (group < 0 or shape[0] % group == 0)


def _renamed(plan: Plan, model: nn.Module) -> list[str]:
    """Tensors whose name in the checkpoint is not the model's.

    A missing or additional prefix of the base model does not count.
    """
    stored = {slot.name for slot in plan.slots}
    prefix = getattr(model, "base_model_prefix", "") + "."
    names = [n for n, _ in model.named_parameters()]
    ours = [
        f"{m}.{plan.format.codes}" if n == f"{m}.weight" and m in plan.grids else n
        for n in names
        for m in [n.rpartition(".")[0]]
    ]
    return [n for n in ours if n not in stored and n.removeprefix(prefix) not in stored]


def groups(plan: Plan) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """(fused name, parts, whether all parts are quantized alike) of what engines fuse."""
    every = every_grid(plan)
    for fused, parts in fused_groups(every):
        yield fused, parts, len({every[p] for p in parts}) == 1


def experts(plan: Plan) -> dict[str, bool]:
    """Container of experts -> whether all of its matrices are quantized alike."""
    every = every_grid(plan)
    return {name: len({every[n] for n in inside}) == 1 for name, inside in expert_groups(every).items()}


def every_grid(plan: Plan) -> dict[str, Grid | None]:
    """Every linear of the blocks -> its grid, None where it is left in 16 bit."""
    return {**plan.grids, **dict.fromkeys(plan.left)}
