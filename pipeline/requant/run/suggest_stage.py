"""Stage suggest of a run: the gain of more bits for the modules with the largest error."""

from __future__ import annotations

from requant.run.context import RunContext
from requant.run.stage_results import SuggestStageResult
from requant.run.suggest import advise


def run_suggest(context: RunContext, key: str) -> SuggestStageResult:
    """Measure every candidate.

    Returns them with their gain and a patch of the recipe, for the report.
    """
    p = context.prepared
    quantized = context.directory.result("quantize", context.keys.quantize) or {}
    return advise(
        quantized["modules"],
        context.variant_sources,
        plan=p.quantize.plan,
        grid=p.quantize.settings.grid,
        overrides=p.overrides,
        calibration=p.texts.calibration,
        device=context.device,
        dtype=context.scores.dtype,
        batch=context.batch,
        progress=context.watcher.progress,
    )
