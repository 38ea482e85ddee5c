"""LoRA on stacked experts (PEFT's `target_parameters`): which parameter each pair belongs to, and where that is stored.

PEFT does not write the parameter's name, and its layout changed with its releases. The base's shapes and the recorded
peft_version together prove it; what they leave open is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from requant.adapters.peft_directory import Adapter, ExpertPair
from requant.adapters.stacked_lora import Experts
from requant.errors import InputError
from requant.modeling.stacked_experts import Fused

NEWEST, OLDEST, TURNED = (0, 22), (0, 18), (0, 19)


def place(adapter: Adapter, fused: Mapping[str, Fused], locate: Callable[[str], str]) -> Iterator[tuple[str, Experts]]:
    """(stored tensor name, fold) of every pair on stacked experts; raises InputError when a layout is not proven."""
    if not adapter.experts:
        return
    version = _version(adapter)
    targets = tuple(str(t) for t in adapter.config.get("target_parameters") or ())
    taken: set[str] = set()
    for pair in adapter.experts:
        module = locate(pair.module)
        owned = {p: f for p, f in fused.items() if p.rpartition(".")[0] == module and _targeted(p, targets)}
        name = _parameter(adapter, pair, owned, version)
        if name in taken:
            raise InputError(f"{adapter.path}: two pairs of {pair.module} fit {name}: which is which is not recorded")
        taken.add(name)
        there = fused[name]
        turned = _turned(there, version)
        for p in there.pieces:
            yield (
                p.name,
                Experts(
                    pair.module,
                    pair.a,
                    pair.b,
                    adapter.scaling(name),
                    there.shape[0],
                    turned,
                    p.expert,
                    p.first,
                    p.last,
                ),
            )


def _targeted(parameter: str, targets: tuple[str, ...]) -> bool:
    """PEFT's rule: the whole name, or its end."""
    return any(parameter == t or parameter.endswith(f".{t}") for t in targets)


def _turned(fused: Fused, version: tuple[int, int]) -> bool:
    """Whether PEFT of that version took the parameter for [experts, in, out]."""
    return fused.transposed or version < TURNED


def _parameter(adapter: Adapter, pair: ExpertPair, owned: Mapping[str, Fused], version: tuple[int, int]) -> str:
    """The one parameter whose shape the pair fits."""
    fits = []
    for name, there in owned.items():
        count, rows, columns = there.shape
        inputs, outputs = (rows, columns) if _turned(there, version) else (columns, rows)
        rank = count * adapter.rank(name)
        if pair.a.shape == (rank, inputs) and pair.b.shape == (outputs, rank):
            fits.append(name)
    if len(fits) == 1:
        return fits[0]
    shapes = ", ".join(f"{n} {f.shape}" for n, f in owned.items()) or "no stacked parameter of that module"
    raise InputError(
        f"{adapter.path}: LoRA {pair.a.shape} x {pair.b.shape} on {pair.module} fits {'both' if fits else 'none'} of the "
        f"base's target_parameters as PEFT {_shown(adapter)} lays them out ({shapes}): its layout is not proven, so it is "
        "not merged"
    )


def _version(adapter: Adapter) -> tuple[int, int]:
    """(major, minor) of the PEFT that wrote the adapter; raises InputError where its expert layout is not known."""
    mapping = adapter.config.get("auto_mapping")
    if isinstance(mapping, Mapping) and mapping.get("unsloth_fixed"):
        raise InputError(
            f"{adapter.path}: written by unsloth, which packs lora_B of experts in another order than PEFT says in its file: "
            "merge it with unsloth's save_pretrained_merged"
        )
    match = re.match(r"(\d+)\.(\d+)", str(adapter.config.get("peft_version") or ""))
    found = (int(match[1]), int(match[2])) if match else (0, 0)
    if not OLDEST <= found < NEWEST:
        raise InputError(
            f"{adapter.path}: LoRA on stacked experts, peft_version {_shown(adapter)}: its layout is known for 0.18 to 0.21 "
            "only. Load it and save it again with one of these"
        )
    return found


def _shown(adapter: Adapter) -> str:
    return str(adapter.config.get("peft_version") or "not recorded")
