"""`requant report --suggest`: measure the candidates and put those that help into a patch of the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from requant import suggest, swap
from requant.prepare import Prepared
from requant.variants import Places


def advise(
    p: Prepared,
    modules: Sequence[Mapping[str, Any]],
    places: Places,
    *,
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    progress: swap.Progress | None = None,
) -> dict[str, Any]:
    """The facts for the report: every candidate with its gain, the best first, and the patch that lifts those that help.

    modules: `ModuleResult` of every quantized module as dicts. A candidate helps when its interval is above 0.
    """
    found = suggest.candidates(modules, p.quantize)
    text = swap.sample(p.calibration)
    before, gains = swap.measure(
        [c.modules for c in found], p.quantize.weights, places, text, device=device, dtype=dtype, batch=batch,
        progress=progress,
    )  # fmt: skip
    ranked = sorted(zip(found, gains, strict=True), key=lambda pair: -pair[1]["kl"]["value"])
    chosen = [c for c, gain in ranked if gain["kl"]["low"] > 0]
    kept = {k: v.model_dump(exclude_none=True, exclude_defaults=True) for k, v in p.recipe.quantize.overrides.items()}
    return {
        "sample": {"windows": len(text.windows), "tokens": text.n_scored},
        "before": before,
        "units": [_unit(c, gain, c in chosen) for c, gain in ranked],
        "patch": suggest.patch_text(suggest.patched(kept, chosen, p.settings.grid)) if chosen else "",
    }


def _unit(c: suggest.Candidate, gain: Mapping[str, Any], helps: bool) -> dict[str, Any]:
    facts = {k: v for k, v in asdict(c).items() if k != "grid"}
    return facts | {"from_bits": c.grid.bits, "gain": gain, "helps": helps}
