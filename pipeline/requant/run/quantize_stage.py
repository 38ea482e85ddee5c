"""Stage quantize of a run: probe the adapter, write the GPTQ checkpoint, verify it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

from requant import __version__, deploy, quantize
from requant.checkpoint.atomic_write import remove
from requant.deploy.scored_sample import Sample
from requant.merge.deltas import deltas
from requant.quantize import gptqmodel_engine, warmup
from requant.quantize.background_writer import JOURNAL
from requant.run.context import RunContext
from requant.run.probe import probe
from requant.run.stage_results import QuantizeStageResult
from requant.runtime.library_imports import training_libraries_ahead
from requant.runtime.ranks import SINGLE_PROCESS

log = logging.getLogger(__name__)


@contextmanager
def load_ahead(context: RunContext) -> Iterator[None]:
    """Import what the probe needs, and compile GPU kernels, in threads during the stages before quantize."""
    finished = context.directory.result("quantize", context.keys.quantize) is not None
    with nullcontext() if finished else training_libraries_ahead(), compile_ahead(context):
        yield


def compile_ahead(context: RunContext) -> AbstractContextManager[None]:
    """Compile GPU kernels in threads during the stages before quantize, on every rank.

    Does nothing where no kernel of ours will run: another engine, or quantize is finished.
    """
    p = context.prepared
    finished = context.directory.result("quantize", context.keys.quantize) is not None
    if finished or context.recipe.quantize.engine != "requant":
        return nullcontext()
    context.ranks.call(warmup.connect, context.device, first_rank_only={})
    return warmup.warm_up(
        p.sources.base,
        p.quantize.plan,
        p.quantize.settings,
        p.quantize.dtype,
        context.device,
        trust_remote_code=context.recipe.trust_remote_code,
    )


def before_quantize(context: RunContext) -> None:
    """Check, before the long work, that the adapter and the grid are worth it.

    Keep the sample for engines.
    Warns when the adapter does not lower the loss on its own text, and when the grid rounds its delta away.
    """
    context.probe = probed = probe(context)
    log.info("probe: %s", probed["said"])
    for warning in probed["warnings"]:
        log.warning("probe: %s", warning)
        context.watcher.warn(warning)
    Sample.of(context.prepared.texts.sets, context.recipe.evaluate.in_domain).save(context.directory.path)
    if context.directory.result("resonance", context.keys.quantize) is None:
        context.watcher.doing("what rounding keeps of the adapter, on a few blocks")
    context.delta_prediction()


def run_quantize(context: RunContext, key: str) -> QuantizeStageResult:
    """Write and verify the artifact `gptq`.

    Returns module results and the verification, for the report.
    Our own engine uses all ranks, gptqmodel the first alone.
    """
    p, recipe = context.prepared, context.recipe
    artifact, merged = context.directory.artifact("gptq"), context.directory.path / "merged"
    out = artifact.begin(key)
    context.watcher.doing("the first block")
    notes: list[str] = []
    own: dict[str, Any] = {"deltas": deltas(p.merge.plan, p.quantize.plan.pieces), "progress": context.watcher.progress}
    if recipe.quantize.engine == "requant":
        ranks, quantizer = context.ranks, f"requant:{__version__}"
        function: Callable[..., Any] = quantize.quantize
        own |= {"notes": notes, "keep_journal": True}
    else:
        ranks, quantizer = SINGLE_PROCESS, f"gptqmodel:{version('gptqmodel')}"
        function = gptqmodel_engine.quantize
    plan, modules = ranks.call(
        function,
        merged,
        out,
        p.texts.calibration,
        p.quantize.settings,
        dtype=p.quantize.dtype,
        device=context.device,
        trust_remote_code=recipe.trust_remote_code,
        max_shard=recipe.merge.max_shard_bytes,
        meta={"quantizer": [quantizer]},
        first_rank_only=own,
    )
    rows = {plan.weights[m.name].removesuffix(".weight"): m.row() for m in modules}
    proof = deploy.verify(
        out, source=merged, solved=rows, deploy=p.quantize.served_as("gptq", recipe.deploy), own_device=context.device,
        trust_remote_code=recipe.trust_remote_code, ranks=context.ranks, doing=context.watcher.doing,
    )  # fmt: skip
    if not proof.ok:
        remove(out / JOURNAL)  # of a file that is wrong: it is solved again
    proof.raise_if_wrong()
    artifact.finish(key, {"stage": "quantize", "requant": __version__}, journal=JOURNAL)
    return {
        "modules": list(rows.values()),
        "bits_per_weight": plan.bits_per_weight,
        "left": list(plan.left),
        "verify": proof.facts(),
        "notes": notes,
    }
