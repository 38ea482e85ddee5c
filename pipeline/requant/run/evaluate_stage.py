"""Stage evaluate of a run: scores of every variant on every set."""

from __future__ import annotations

from requant.evaluate import over_ranks
from requant.evaluate.stage import EvaluationResult
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
    )
