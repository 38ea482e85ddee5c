"""Facts of the formats that a run wrote its checkpoint in, for its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict, cast

from requant.run.output_formats import weight_files
from requant.run.prepared import Prepared
from requant.run.stage_results import ConvertedFacts, StageResults


class FormatFacts(TypedDict):
    """The deployed checkpoint in one format.

    directory: in the run's. bytes: of its weights' files. bits_per_weight: of quantized linears, scales included.
    read_by: engines that load it by the engine table. made_from: the directory that it was compared with, None: the
    merged model. largest_rounding: of a weight, in steps of its scale. ends: bits of quantized embeddings and head, by
    module. loaded_in: engines that loaded it here.
    """

    directory: str
    bytes: int
    bits_per_weight: float | None
    read_by: Sequence[str]
    made_from: str | None
    largest_rounding: float
    ends: Mapping[str, int]
    loaded_in: Sequence[str]


def format_facts(prepared: Prepared, stages: StageResults, run: Path) -> dict[str, FormatFacts]:
    """Format -> the checkpoint in it; of the formats that the recipe names."""
    deployed, results = "healed" if prepared.heal else "gptq", cast(Mapping[str, ConvertedFacts], stages)
    found: dict[str, FormatFacts] = {}
    for name, readers in prepared.quantize.readers.items():
        result = results.get(name) if name != "gptq" else None
        proof = (result or stages["heal" if prepared.heal else "quantize"]).get("verify")
        directory = deployed if result is None else name
        found[name] = {
            "directory": directory,
            "bytes": weight_bytes(run / directory),
            "bits_per_weight": proof and proof["bits_per_weight"],
            "read_by": readers,
            "made_from": result and result["made_from"],
            "largest_rounding": result.get("largest_rounding", 0.0) if result else 0.0,
            "ends": result.get("ends", {}) if result else {},
            "loaded_in": [engine["engine"] for engine in proof["engines"] if engine.get("ok")] if proof else [],
        }
    return found


def weight_bytes(path: Path) -> int:
    """Bytes of the weights' files in a directory, 0 without any."""
    return sum(f.stat().st_size for f in weight_files(path))
