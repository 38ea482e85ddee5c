"""Keys of stages and variants: digests of all that each depends on."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from requant.checkpoint.run_directory import RunDirectory, key_of
from requant.merge.plan import MergePlan
from requant.run.prepared import Prepared

LAYOUT = 3  # raised when a stage's files change their meaning


@dataclass(frozen=True)
class Keys:
    """What each stage and variant depends on, as digests."""

    merge: str
    quantize: str
    heal: str
    variants: dict[str, str]

    @property
    def suggest(self) -> str:
        return key_of(self.quantize, "suggest")

    @classmethod
    def of(cls, p: Prepared, directory: RunDirectory, device: torch.device) -> Keys:
        """From the content of all inputs and the settings that matter to each."""
        base = directory.fingerprint(p.sources.base)
        prints = [(directory.fingerprint(a.path), a.weight) for a in p.merge.plan.adapters]
        adapter = prints[0][0] if len(prints) == 1 and prints[0][1] == 1 else key_of(prints)
        adapter = _with_expert_orders(adapter, p.merge.plan)
        original = directory.fingerprint(p.sources.original) if p.sources.original else None
        simulate = asdict(p.sources.simulate) if p.sources.simulate else None
        onto = (original, None) if p.recipe.merge.onto == "original" else (base, simulate)
        merged = key_of(LAYOUT, "merge", onto, adapter, p.recipe.merge.model_dump())
        grids = {name: asdict(grid) for name, grid in p.quantize.plan.grids.items()}
        settings = (
            p.quantize.settings.order,
            p.quantize.settings.sweeps,
            p.quantize.settings.correct,
            p.quantize.settings.damp,
            str(p.quantize.dtype),
        )
        engine = p.recipe.quantize.engine
        stage = "quantize" if engine == "requant" else f"quantize by {engine}"
        quantized = key_of(merged, stage, grids, settings, p.texts.calibration_facts["digest"], device.type)
        healed = key_of(quantized, "heal", p.heal.key if p.heal else None, base, simulate, adapter)
        every = {
            "base": key_of(LAYOUT, "base", base, simulate),
            "adapter": key_of(LAYOUT, "adapter", base, simulate, adapter),
            "merged": merged,
            "original": key_of(LAYOUT, "original", original, adapter),
            "rtn": key_of(merged, "rtn", grids),
            "gptq": quantized,
            "healed": healed,
            "ends": _with_ends(healed if p.heal else quantized, p),
        }
        return cls(merged, quantized, healed, {v: every[v] for v in p.variants})


def _with_ends(key: str, p: Prepared) -> str:
    """The key of the deployed checkpoint, and of how its token embeddings and head are rounded."""
    return key_of(key, "ends", {name: asdict(grid) for name, grid in p.quantize.ends.grids.items()})


def _with_expert_orders(adapter: str, plan: MergePlan) -> str:
    """The key of the adapters, and which of their tensors are read in unsloth's order of experts."""
    found = plan.unsloth_experts
    names = [sorted(name for name, info in a.tensors.items() if info in found) for a in plan.adapters]
    return key_of(adapter, "experts as unsloth orders them", names) if any(names) else adapter
