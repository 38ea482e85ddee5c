"""What a recipe gives to the stage that scores: where variants are made from, dtype and batch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from requant.checkpoint.run_directory import RunDirectory, key_of
from requant.data.packing import digest
from requant.errors import StageError
from requant.evaluate import adapter_probe, variants
from requant.evaluate import stage as evaluate
from requant.evaluate.variants import Places
from requant.merge.stage import DTYPES
from requant.run.prepare import Prepared
from requant.run.stage_keys import LAYOUT


def places(p: Prepared, run: Path) -> Places:
    """Where variants are made from, in the run directory `run`."""
    return Places(
        p.base, p.adapter, run / "merged", run / "gptq", p.simulate, p.quantize.grids, p.original_merge,
        p.recipe.trust_remote_code, p.merge, run / "healed", p.unheld is None,
    )  # fmt: skip


def dtype(p: Prepared, device: torch.device) -> torch.dtype:
    """The forward pass: fp32 on a CPU, the serving dtype on a GPU, unless asked otherwise."""
    asked = p.recipe.evaluate.dtype
    if asked != "auto":
        return DTYPES[asked]
    return torch.float32 if device.type == "cpu" else p.serving_dtype


def batch(p: Prepared, device: torch.device) -> int:
    """Windows at a time."""
    asked = p.recipe.evaluate.batch
    tokens = 2048 if device.type == "cpu" else 16384
    return max(1, tokens // p.sets[0].window) if asked == "auto" else asked


def probe_stage(
    prepared: Prepared, directory: RunDirectory, scores: evaluate.Scores, places: variants.Places, batch: int
) -> dict[str, Any]:
    """What was measured, or remembered: the probes, one line of them, and warnings."""
    digests = {name: [digest(r[None]) for r in rows] for name, rows in prepared.probes.items()}
    reference = scores.keys[evaluate.REFERENCE]
    key = key_of(LAYOUT, "probe", reference, digests, str(scores.dtype), scores.device.type)
    known = directory.result("probe", key)
    if known is not None:
        return known
    try:
        stream = prepared.recipe.evaluate.stream
        model = evaluate.reference(scores, places, prepared.probes, batch=batch, stream=stream)
        probes = adapter_probe.measure(model, prepared.probes, scores.device)
        said, warnings = adapter_probe.verdict(probes)
        known = {"probes": [asdict(p) for p in probes], "said": said, "warnings": warnings}
    except StageError as error:
        known = {"probes": [], "said": f"the adapter's loss was not measured: {error}", "warnings": []}
    directory.remember("probe", key, known)
    return known
