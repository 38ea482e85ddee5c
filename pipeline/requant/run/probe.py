"""Adapter probe of a run: does the adapter lower the loss on its calibration text?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, cast

from requant.checkpoint.run_directory import key_of
from requant.errors import StageError
from requant.evaluate import adapter_probe
from requant.evaluate.scores import REFERENCE
from requant.evaluate.stage import load_reference
from requant.evaluate.streamed import StreamedModel
from requant.evaluate.trained_base import decoded_once
from requant.run.context import RunContext
from requant.run.stage_keys import LAYOUT
from requant.run.stage_results import ProbeResult
from requant.runtime.device import free_bytes

KEPT = 0.01  # of the device's free memory, for the probe's model while quantize runs


def probe(context: RunContext) -> ProbeResult:
    """Loss of base and adapter on a few rows of each calibration source; stored by key."""
    scores, rows = context.scores, context.prepared.texts.probes
    ids = {name: [row.ids for row in source] for name, source in rows.items()}
    digests = {name: [row.digest for row in source] for name, source in rows.items()}
    reference = scores.keys[REFERENCE]
    key = key_of(LAYOUT, "probe", reference, digests, str(scores.dtype), scores.device.type)
    stored = cast("ProbeResult | None", context.directory.result("probe", key))
    if stored is not None:
        return stored
    result: ProbeResult
    context.watcher.stage("probe", done=False)
    context.watcher.doing(f"loss with and without the adapter on {sum(map(len, rows.values()))} rows of its own text")
    try:
        model = load_reference(
            scores, context.variant_sources, ids, batch=context.batch, stream=context.recipe.evaluate.stream
        )
        batch = 1 if isinstance(model, StreamedModel) else context.batch  # streamed, it has run its rows already
        with decoded_once(model, scores.device):  # for few rows, with the adapter and without
            probes = adapter_probe.measure(model, rows, scores.device, batch)
        context.reference = model if _may_stay(model, context) else None
        said, warnings = adapter_probe.verdict(probes)
        result = {
            "probes": cast(list[adapter_probe.ProbeFacts], [asdict(p) for p in probes]),
            "said": said,
            "warnings": warnings,
        }
    except StageError as error:
        result = {"probes": [], "said": f"the adapter's loss was not measured: {error}", "warnings": []}
    context.directory.remember("probe", key, dict(result))
    return result


def _may_stay(model: Any, context: RunContext) -> bool:
    """Whether the model stays in memory while quantize runs, so that evaluate need not load it again."""
    if isinstance(model, StreamedModel) or context.ranks.count > 1:
        return False
    nbytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return bool(nbytes <= KEPT * free_bytes(context.device))
