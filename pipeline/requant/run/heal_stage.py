"""Stage heal of a run: distil the quantized checkpoint into a new one, verify it."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, Literal

import torch

from requant import __version__, deploy, heal
from requant.checkpoint.reader import Checkpoint
from requant.evaluate import variants
from requant.evaluate.variant_sources import VariantSources
from requant.heal.job import HealJob
from requant.numerics.dtypes import DTYPES
from requant.run.context import RunContext
from requant.run.stage_results import HealedFacts

log = logging.getLogger(__name__)


def run_heal(context: RunContext, key: str) -> HealedFacts:
    """Write the artifact `healed`.

    Returns losses, settings and the verification, for the report.
    """
    asked, sources, device = context.prepared.heal, context.variant_sources, context.device
    assert asked is not None, "the stage is part of a run only with healing"
    scratch = context.directory.scratch("heal", key)
    artifact = context.directory.artifact("healed")
    out = artifact.begin(key)
    plan, target = asked.plan(device), asked.section.target
    log.info("heal: %s", plan)
    stored = DTYPES.get(str(Checkpoint(sources.merged).config.get("dtype")))
    job = HealJob(
        source=sources.gptq,
        teacher=sources.merged,
        load_teacher=partial(_teacher, target, sources, stored),
        text=asked.text,
        settings=asked.settings,
        plan=plan,
        device=device,
        work=scratch,
        key=key,
        trust_remote_code=sources.trust_remote_code,
    )
    facts = heal.heal(
        job, out, meta={"healer": [f"requant:{__version__}"]}, progress=context.watcher.progress, ranks=context.ranks
    )
    proof = deploy.verify(
        out, source=sources.merged, deploy=context.prepared.quantize.served_as("gptq", asked.deploy), own_device=device,
        trust_remote_code=sources.trust_remote_code, ranks=context.ranks, doing=context.watcher.doing,
    )  # fmt: skip
    proof.raise_if_wrong()
    artifact.finish(key, {"stage": "heal", "requant": __version__, "of": context.keys.quantize})
    return {**facts, "data": asked.facts["data"], "target": target, "verify": proof.facts()}


def _teacher(
    target: Literal["merged", "adapter"], sources: VariantSources, stored: torch.dtype | None, device: torch.device
) -> Any:
    """The model that is imitated, on a rank's device."""
    return variants.teacher(target, sources, device=device, stored=stored)
