"""Inputs of the evaluation from a recipe: sources of the variants, dtype, batch."""

from __future__ import annotations

from pathlib import Path

import torch

from requant.evaluate.variant_sources import VariantSources
from requant.numerics.dtypes import DTYPES
from requant.run.prepared import Prepared
from requant.runtime.device import compute_dtype, profile_of
from requant_eval.scoring.batches import BatchSize


def variant_sources(p: Prepared, run: Path) -> VariantSources:
    """Where variants are made from, in the run directory `run`."""
    return VariantSources(
        base=p.sources.base,
        adapter=p.sources.adapter,
        merged=run / "merged",
        gptq=run / "gptq",
        simulate=p.sources.simulate,
        grids=p.quantize.plan.grids,
        ends=p.quantize.ends.grids,
        deployed=run / ("healed" if p.heal else "gptq"),
        original=p.merge.onto_original,
        trust_remote_code=p.recipe.trust_remote_code,
        plan=p.merge.plan,
        healed=run / "healed",
        live=p.unloadable is None,
        gptqmodel=run / "gptqmodel",
        sixteen_bit=p.recipe.base.nf4 == "none",
    )


def dtype(p: Prepared, device: torch.device) -> torch.dtype:
    """The forward pass: fp32 on a CPU, the serving dtype on a GPU, unless asked otherwise."""
    asked = p.recipe.evaluate.dtype
    if asked != "auto":
        return DTYPES[asked]
    return compute_dtype(device, p.quantize.dtype)


def batch(p: Prepared, device: torch.device) -> BatchSize:
    """How much runs at a time: so many tokens, or as many windows as the recipe asks for."""
    asked, profile = p.recipe.evaluate.batch, profile_of(device)
    if asked == "auto":
        return BatchSize(tokens=profile.scoring_tokens, padding=profile.scoring_padding)
    return BatchSize(windows=asked, padding=profile.scoring_padding)
