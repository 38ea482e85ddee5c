"""Stage evaluate of a run: scores of every variant on every set."""

from __future__ import annotations

from typing import Any

import torch

from requant.evaluate import over_ranks, variants
from requant.evaluate.scores import REFERENCE
from requant.evaluate.stage import EvaluationResult
from requant.evaluate.variant_sources import VariantSources
from requant.evaluate.variants import Load
from requant.run.context import RunContext

OF_MERGED = {"merged", "rtn", "original"}  # variants whose weights come from the merged checkpoint


def is_evaluated(context: RunContext, key: str) -> bool:
    """Whether every score and every canary answer is saved."""
    return not context.scores.missing()


def evaluate_needs(context: RunContext) -> tuple[str, ...]:
    """The merged checkpoint, where a variant that is made from it has no scores yet."""
    return ("merge",) if OF_MERGED & context.scores.missing().keys() else ()


def run_evaluate(context: RunContext, key: str) -> EvaluationResult:
    """Score what has no scores yet, on all ranks.

    Returns which variants, how, and notes for the report.
    """
    return over_ranks.evaluate(
        context.scores,
        context.variant_sources,
        ranks=context.ranks,
        batch=context.batch,
        stream=context.recipe.evaluate.stream,
        progress=context.watcher.progress,
        load=_load(context),
    )


def _load(context: RunContext) -> Load:
    """How models are loaded: the reference's is the probe's, where that was kept."""
    kept, context.reference = [context.reference] if context.reference is not None else [], None

    def load(name: str, sources: VariantSources, *, device: torch.device, dtype: torch.dtype) -> Any:
        if name == REFERENCE and kept:
            return kept.pop()
        return variants.load(name, sources, device=device, dtype=dtype)

    return load
