"""Assigns each LoRA pair on experts to its stacked parameter and stored tensors.

PEFT does not write the parameter's name of `target_parameters`, and its layout changed with its releases. The base's
shapes and the recorded peft_version together prove both; a pair that they leave open is refused. The order of lora_B's
columns is no matter of shapes: `expert_order`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from requant.adapters import expert_order, lora
from requant.adapters.peft_directory import Adapter
from requant.adapters.stacked_lora import ExpertPair, StackedLora
from requant.errors import InputError
from requant.modeling.stacked_experts import StackedParameter

OLDEST, NEWEST = (0, 18), (0, 22)  # releases of PEFT whose layout is known: from OLDEST to before NEWEST
ORIENTED = (0, 19)  # since this release a parameter that is stored as [experts, out, in] is taken for that


def assign(
    adapter: Adapter, fused: Mapping[str, StackedParameter], locate: Callable[[str], str]
) -> Iterator[tuple[str, StackedLora]]:
    """Pairs (stored tensor's name, fold): the LoRA of every stacked parameter.

    Raises InputError when a layout is not proven.
    fused: stacked parameter of the model -> its shape and where it is stored. locate: the base's name of a module.
    """
    if not adapter.expert_pairs:
        return
    version = _version(adapter)
    targets = tuple(str(t) for t in adapter.config.get("target_parameters") or ())
    taken: set[str] = set()
    for pair in adapter.expert_pairs:
        module = locate(pair.module)
        candidates = {p: f for p, f in fused.items() if p.rpartition(".")[0] == module and _targeted(p, targets)}
        name = _parameter(adapter, pair, candidates, version)
        if name in taken:
            raise InputError(f"{adapter.path}: two pairs of {pair.module} fit {name}: which is which is not recorded")
        taken.add(name)
        order = expert_order.order_of(adapter, name)
        for part in fused[name].parts:
            fold = StackedLora(
                module=pair.module,
                a=pair.a,
                b=pair.b,
                scaling=lora.scaling(adapter.config, name),
                experts=fused[name].shape[0],
                transposed=_transposed(fused[name], version),
                expert=part.expert,
                first=part.first,
                last=part.last,
                turns=part.turns,
                order=order,
            )
            yield part.name, fold


def _targeted(parameter: str, targets: tuple[str, ...]) -> bool:
    """PEFT's rule: the whole name, or its end."""
    return any(parameter == t or parameter.endswith(f".{t}") for t in targets)


def _transposed(parameter: StackedParameter, version: tuple[int, int]) -> bool:
    """Whether PEFT of that version took the parameter for [experts, in, out]."""
    return parameter.transposed or version < ORIENTED


def _parameter(
    adapter: Adapter, pair: ExpertPair, candidates: Mapping[str, StackedParameter], version: tuple[int, int]
) -> str:
    """The one parameter whose shape the pair fits."""
    fits = []
    for name, parameter in candidates.items():
        count, rows, columns = parameter.shape
        inputs, outputs = (rows, columns) if _transposed(parameter, version) else (columns, rows)
        rank = count * adapter.config.rank(name)
        if pair.a.shape == (rank, inputs) and pair.b.shape == (outputs, rank):
            fits.append(name)
    if len(fits) == 1:
        return fits[0]
    shapes = ", ".join(f"{n} {f.shape}" for n, f in candidates.items()) or "no stacked parameter of that module"
    raise InputError(
        f"{adapter.path}: LoRA {pair.a.shape} x {pair.b.shape} on {pair.module} fits "
        f"{'both' if fits else 'none'} of the base's target_parameters as PEFT {_shown(adapter)} lays them out "
        f"({shapes}): its layout is not proven, so it is not merged"
    )


def _version(adapter: Adapter) -> tuple[int, int]:
    """(major, minor) of the PEFT release that wrote the adapter.

    Raises InputError where the layout of experts in that release is not known.
    """
    match = re.match(r"(\d+)\.(\d+)", str(adapter.config.get("peft_version") or ""))
    found = (int(match[1]), int(match[2])) if match else (0, 0)
    if not OLDEST <= found < NEWEST:
        raise InputError(
            f"{adapter.path}: LoRA on stacked experts, peft_version {_shown(adapter)}: its layout is known for 0.18 to "
            "0.21 only. Load it and save it again with one of these"
        )
    return found


def _shown(adapter: Adapter) -> str:
    return str(adapter.config.get("peft_version") or "not recorded")
