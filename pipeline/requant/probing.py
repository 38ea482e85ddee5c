"""Before the long work of a recipe's run: does the adapter lower the loss on its own text?"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from requant import evaluate, probe, variants
from requant.data import digest
from requant.errors import StageError
from requant.keys import LAYOUT
from requant.prepare import Prepared
from requant.rundir import RunDirectory, key_of


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
        probes = probe.measure(model, prepared.probes, scores.device)
        said, warnings = probe.verdict(probes)
        known = {"probes": [asdict(p) for p in probes], "said": said, "warnings": warnings}
    except StageError as error:
        known = {"probes": [], "said": f"the adapter's loss was not measured: {error}", "warnings": []}
    directory.remember("probe", key, known)
    return known
