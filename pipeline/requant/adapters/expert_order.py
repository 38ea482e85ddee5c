"""Order of the experts in lora_B of a stacked parameter: PEFT's, or unsloth's older one.

    peft      column j is of expert j % experts          the ranks one after the other
    unsloth   column j is of expert j // rank            the experts one after the other

Both have the same shape. Since September 2026 unsloth trains in PEFT's order and writes `lora_B_layout` to
adapter_config.json. Its older adapters record no order: unless the recipe names it, it has to be measured.
(unslothai/unsloth issue 6930; unslothai/unsloth-zoo pull requests 1232 and 1269.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from requant.adapters.config import AdapterConfig
from requant.adapters.peft_directory import Adapter
from requant.adapters.setting_types import shown
from requant.adapters.stacked_lora import Order
from requant_eval.regular_files import read_bytes

LAYOUT, DETAIL = "lora_B_layout", "unsloth_fused_expert_lora"
"""Keys of adapter_config.json in which unsloth records the order: of the file, and of each parameter."""
KEY = "expert_order"
CARD = "README.md"
WORDS: Mapping[str, str] = {"peft": "PEFT's order", "unsloth": "unsloth's order"}
_LAYOUTS: Mapping[str, Order] = {"rank_major": "peft", "grouped_by_expert": "unsloth"}
_SEVERAL = "mixed"  # recorded of a file whose parameters differ
_MOST = 2**16  # bytes of a model card that are read


def order_of(adapter: Adapter, parameter: str) -> Order:
    """The order in which the adapter's lora_B of a stacked parameter is read.

    That of the recipe or of a measurement, or else the recorded one, or else PEFT's: see `is_open`.
    Raises InputError for a record that is not known, and for one of other parameters only.
    """
    if adapter.expert_order != "auto":
        return adapter.expert_order
    recorded, leaf = _recorded(adapter.config), parameter.rpartition(".")[2]
    order = recorded.get(leaf) or recorded.get("")
    if order is None and recorded and _differ(adapter):
        raise adapter.config.error(
            f"{DETAIL} records the order of experts of {', '.join(sorted(recorded))}, and none of {leaf}: "
            f"write {KEY}: unsloth (or peft) beside the adapter's path in the recipe"
        )
    return order or "peft"


def is_open(adapter: Adapter) -> bool:
    """Whether the order is to be measured: unsloth's adapter, no order recorded, and the two orders differ."""
    if adapter.expert_order != "auto" or _recorded(adapter.config) or not _differ(adapter):
        return False
    return written_by_unsloth(adapter) is not None


def written_by_unsloth(adapter: Adapter) -> str | None:
    """What in the adapter's directory says that unsloth may have trained it; None: nothing does."""
    config = adapter.config
    mapping = config.get("auto_mapping")
    if isinstance(mapping, Mapping) and mapping.get("unsloth_fixed"):
        return "auto_mapping.unsloth_fixed"
    for key in ("unsloth_version", LAYOUT, DETAIL):
        if config.get(key):
            return key
    if "unsloth" in str(config.get("base_model_name_or_path") or "").lower():
        return "base_model_name_or_path"
    return CARD if "unsloth" in _front_matter(adapter.path / CARD).lower() else None


def said(adapter: Adapter) -> str | None:
    """How the order of the experts was found or will be, in a sentence; None where there is nothing to say."""
    name, order = adapter.name, adapter.expert_order
    if not adapter.expert_pairs:
        return f"{name}: {KEY} has no effect, it has no LoRA on stacked experts" if order != "auto" else None
    if is_open(adapter):
        return (
            f"{name}: {written_by_unsloth(adapter)} names unsloth, and no file says whether lora_B of the experts is "
            "in PEFT's order or in unsloth's older one: the loss with both is measured before the merge, which "
            f"decides it or stops. {KEY}: unsloth (or peft) beside the adapter's path decides it at once"
        )
    if order == "auto":
        recorded = _recorded(adapter.config).values()
        return f"{name}: lora_B of experts is in unsloth's order, as {LAYOUT} says" if "unsloth" in recorded else None
    why = adapter.order_reason or "as the recipe says"
    others = [layout for layout in _layouts(adapter.config).values() if _LAYOUTS.get(layout) != order]
    against = f", although {LAYOUT} says {others[0]}" if others else ""
    return f"{name}: lora_B of experts is read in {WORDS[order]}, {why}{against}"


def sentences(adapters: Iterable[Adapter]) -> list[str]:
    """What `said` says of some adapters."""
    return [sentence for adapter in adapters if (sentence := said(adapter))]


def _recorded(config: AdapterConfig) -> dict[str, Order]:
    """Leaf of a stacked parameter, or "" for all others -> the order that adapter_config.json records."""
    found = _layouts(config)
    unknown = next((layout for layout in found.values() if layout not in _LAYOUTS), None)
    if unknown is not None:
        raise config.error(
            f"{LAYOUT} is {unknown}, expected {' or '.join(_LAYOUTS)}: the order of its experts is not known. "
            f"Write {KEY}: unsloth (or peft) beside the adapter's path in the recipe"
        )
    return {leaf: _LAYOUTS[layout] for leaf, layout in found.items()}


def _layouts(config: AdapterConfig) -> dict[str, str]:
    """What adapter_config.json says of each leaf and, as "", of all others, whether it is known or not.

    Of a leaf whose layers differ: `_SEVERAL`.
    """
    detail, whole = config.get(DETAIL), config.get(LAYOUT)
    parameters = detail.get("parameters") if isinstance(detail, Mapping) else None
    found: dict[str, Any] = {}
    for name, own in parameters.items() if isinstance(parameters, Mapping) else ():
        if isinstance(own, Mapping) and own.get(LAYOUT) is not None:
            leaf = str(name).rpartition(".")[2]
            found[leaf] = own[LAYOUT] if found.get(leaf, own[LAYOUT]) == own[LAYOUT] else _SEVERAL
    if whole is not None and not (found and whole == _SEVERAL):
        found[""] = whole
    return {leaf: layout if isinstance(layout, str) else shown(layout) for leaf, layout in found.items()}


def _differ(adapter: Adapter) -> bool:
    """Whether the orders differ: with one expert, or of rank 1, they are the same."""
    ranks = [adapter.config.get("r"), *(adapter.config.get("rank_pattern") or {}).values()]
    return any(1 < rank < pair.a.shape[0] for pair in adapter.expert_pairs for rank in ranks if isinstance(rank, int))


def _front_matter(card: Path) -> str:
    """The YAML head of a model card; empty where there is none."""
    try:
        text = read_bytes(card, _MOST).decode(errors="replace")
    except OSError:
        return ""
    return text.split("\n---", 1)[0] if text.startswith("---") else ""
