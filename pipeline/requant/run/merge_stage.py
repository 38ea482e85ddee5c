"""Stage merge of a run: write and verify the merged checkpoint."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch

from requant import __version__, merge
from requant.adapters import expert_order
from requant.errors import StageError
from requant.evaluate.finite_forward import first_overflow
from requant.merge import selftest
from requant.merge.stage import MergeResult
from requant.run.context import RunContext
from requant.run.stage_results import MergeStageResult
from requant.runtime.launch import current_ranks

log = logging.getLogger(__name__)
TRIED = 32  # tokens of the forward in float16: the largest activations are those of the first ones


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
        stops=context.prepared.merge.stops,
        progress=context.watcher.progress,
        ranks=current_ranks(),
    )
    context.watcher.doing("a few rows, recomputed in fp64")
    proof = selftest.self_test(plan, out)
    _prove_float16(context, merged, out)
    orders = expert_order.sentences(plan.adapters)
    context.watcher.doing("waiting for the disk, and digests of the files")
    artifact.finish(key, {"stage": "merge", "requant": __version__} | ({"experts": orders} if orders else {}))
    return cast(MergeStageResult, asdict(merged) | {"selftest": asdict(proof)})


def _prove_float16(context: RunContext, merged: MergeResult, out: Path) -> None:
    """One forward in float16 where a checkpoint ships in it: weights that fit are no proof that activations do.

    Adds the outcome to `merged.why`; raises StageError when it gives NaN or infinity.
    """
    p = context.prepared
    shipped = {"merge.dtype": merged.dtype, "quantize.dtype": str(p.quantize.dtype).removeprefix("torch.")}
    keys = [key for key, dtype in shipped.items() if dtype == "float16"]
    if not keys:
        return
    window = p.texts.calibration[:1, :TRIED]
    context.watcher.doing("one forward in float16, to see that nothing overflows")
    try:
        where = first_overflow(
            out,
            window,
            dtype=torch.float16,
            device=context.device,
            trust_remote_code=context.recipe.trust_remote_code,
        )
    except RuntimeError as error:  # a layer that this processor cannot compute in float16
        log.info("no forward in float16: %s", error)
        merged.warnings.append("whether the model runs in float16 is not proven: this processor cannot compute it")
        return
    if where is not None:
        raise StageError(
            f"in float16 the merged model gives NaN or infinity from {where} on: its weights fit, what it computes "
            f"does not: set {' and '.join(keys)} to bfloat16"
        )
    merged.why += f"; one forward of {window.numel()} tokens in float16 is finite"
