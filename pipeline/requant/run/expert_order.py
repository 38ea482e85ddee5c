"""The order of an adapter's experts, measured where neither its files nor the recipe say it.

Done before the stages, since what they do depends on it; the result is stored and not measured again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, cast

import torch

from requant.adapters import expert_order, peft_directory
from requant.adapters.peft_directory import Adapter
from requant.adapters.stacked_lora import Order
from requant.checkpoint.run_directory import RunDirectory, key_of
from requant.errors import InputError
from requant.evaluate import expert_order_probe
from requant.evaluate.adapter_probe import MAX_LENGTH, MAX_ROWS, MIN_LENGTH, ProbeRow
from requant.evaluate.expert_order_probe import OrderFacts
from requant.evaluate.planned_merge import Device
from requant.merge.base_weights import Nf4Settings
from requant.merge.plan import MergePlan
from requant.run import evaluation_inputs
from requant.run.observer import Watcher
from requant.run.prepare import plan_merge
from requant.run.prepared import Prepared
from requant.runtime.device import pick_device

LAYOUT = 1  # raised when what is measured changes
ORDERS: tuple[Order, ...] = ("peft", "unsloth")


class OrderResult(TypedDict):
    """One adapter's order: the right one (None: cannot be told), why, and what was measured."""

    adapter: str
    order: Order | None
    why: str
    facts: list[OrderFacts]


def decided(prepared: Prepared, directory: RunDirectory, watcher: Watcher) -> Prepared:
    """`prepared` with the order of every adapter's experts known.

    Raises InputError where measuring cannot tell: then the recipe has to say it.
    """
    plan = prepared.merge.plan
    if not any(map(expert_order.is_open, plan.adapters)):
        return prepared
    adapters, found = [], []
    for adapter in plan.adapters:
        if expert_order.is_open(adapter):
            result = _measured(prepared, adapter, directory, watcher)
            adapter = _with_order(adapter, result)
            found.append(result)
            watcher.doing(str(expert_order.said(adapter)))
        adapters.append(adapter)
    again, onto_original, other = (
        _planned_again(p, adapters, trust_remote_code=prepared.recipe.trust_remote_code) if p else None
        for p in (plan, prepared.merge.onto_original, prepared.merge.other)
    )
    assert again is not None
    told = [w for w in prepared.warnings if w not in plan.warnings]
    return replace(
        prepared,
        merge=replace(prepared.merge, plan=again, onto_original=onto_original, other=other),
        warnings=(*again.warnings, *told),
    )


def _planned_again(plan: MergePlan, adapters: Sequence[Adapter], *, trust_remote_code: bool) -> MergePlan:
    path, simulate = plan.base.checkpoint.path, plan.base.simulate
    return replace(plan_merge(path, adapters, simulate, trust_remote_code=trust_remote_code)[0], stored=plan.stored)


def _with_order(adapter: Adapter, result: OrderResult) -> Adapter:
    """The adapter in the order that was measured; raises InputError where none was."""
    if result["order"] is None:
        raise InputError(
            f"{adapter.path}: unsloth wrote this adapter ({expert_order.written_by_unsloth(adapter)}), its files do "
            "not say in which order lora_B holds the experts, and the text of this recipe does not tell: "
            f"{result['why']}. Give text of its kind (calibration.data), or write {expert_order.KEY}: unsloth (trained "
            "before unsloth-zoo of September 2026) or peft beside the adapter's path"
        )
    return replace(adapter, expert_order=result["order"], order_reason=f"measured: {result['why']}")


def _measured(prepared: Prepared, adapter: Adapter, directory: RunDirectory, watcher: Watcher) -> OrderResult:
    """The measurement of one adapter alone, on calibration text, or else on the evaluation sets; stored by key."""
    device = pick_device(prepared.recipe.device)
    where = Device(device, evaluation_inputs.dtype(prepared, device), evaluation_inputs.batch(prepared, device))
    texts = (prepared.texts.probes, _of_sets(prepared))
    key = key_of(
        LAYOUT,
        "expert order",
        directory.fingerprint(prepared.sources.base),
        repr(prepared.sources.simulate),
        directory.fingerprint(adapter.path),
        [{name: [row.digest for row in rows] for name, rows in text.items()} for text in texts],
        (str(where.dtype), device.type),
    )
    name = f"expert order of {adapter.name}"
    stored = directory.result(name, key)
    if stored is not None:
        return cast(OrderResult, stored)
    watcher.stage("expert order", done=False)
    trust = prepared.recipe.trust_remote_code
    plans = _plans(prepared.sources.base, adapter.path, prepared.sources.simulate, trust_remote_code=trust)
    sources = evaluation_inputs.variant_sources(prepared, directory.path)
    facts: list[OrderFacts] = []
    order, why = None, "it has no rows"
    for text in filter(None, texts):
        facts += expert_order_probe.measure(plans, sources, text, where, watcher.doing)
        order, why = expert_order_probe.decide(facts)
        if order is not None:
            break
    result: OrderResult = {"adapter": adapter.name, "order": order, "why": why, "facts": facts}
    directory.remember(name, key, dict(result))
    return result


def _plans(base: Path, path: Path, simulate: Nf4Settings | None, *, trust_remote_code: bool) -> dict[Order, MergePlan]:
    """The merge of one adapter alone in each order."""
    return {
        order: plan_merge(
            base, peft_directory.load(path, expert_order=order), simulate, trust_remote_code=trust_remote_code
        )[0]
        for order in ORDERS
    }


def _of_sets(prepared: Prepared) -> Mapping[str, tuple[ProbeRow, ...]]:
    """A few rows of every evaluation set, for where the calibration text does not tell."""
    found: dict[str, tuple[ProbeRow, ...]] = {}
    for item in prepared.texts.sets:
        rows = [w for w in item.windows if len(w.ids) >= MIN_LENGTH]
        step = max(1, len(rows) // MAX_ROWS)
        if rows:
            found[f"evaluation set {item.name}"] = tuple(
                ProbeRow(torch.as_tensor(w.ids), torch.as_tensor(w.scored)).cut(MAX_LENGTH)
                for w in rows[::step][:MAX_ROWS]
            )
    return found
