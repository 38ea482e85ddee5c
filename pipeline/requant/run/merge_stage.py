"""Stage merge of a run: write and verify the merged checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from typing import cast

from requant import __version__, merge
from requant.merge import selftest
from requant.run.context import RunContext
from requant.run.stage_results import MergeStageResult


def run_merge(context: RunContext, key: str) -> MergeStageResult:
    """Write the artifact `merged`; returns its ledger and the self-test, for the report."""
    artifact, plan, section = context.directory.artifact("merged"), context.prepared.merge.plan, context.recipe.merge
    out = artifact.begin(key)
    merged = merge.merge(
        plan,
        out,
        dtype=section.dtype,
        max_shard=section.max_shard_bytes,
        device=context.device,
        progress=context.watcher.progress,
    )
    proof = selftest.self_test(plan, out)
    artifact.finish(key, {"stage": "merge", "requant": __version__})
    return cast(MergeStageResult, asdict(merged) | {"selftest": asdict(proof)})
