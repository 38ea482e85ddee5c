"""Stages of a run that write its checkpoint in other formats, one a format."""

from __future__ import annotations

from dataclasses import asdict

from requant import __version__, deploy
from requant.checkpoint.run_directory import key_of
from requant.deploy import gguf_export
from requant.deploy.conversion import Conversion, convert_into
from requant.deploy.gguf_verification import verify_gguf
from requant.formats.registry import FORMATS
from requant.run.context import RunContext
from requant.run.stage_results import ConvertedFacts

CONVERTED = (*(name for name in FORMATS if name != "gptq"), gguf_export.FORMAT)


def source_stages(context: RunContext) -> tuple[str, ...]:
    """The stage that wrote the checkpoint that is deployed."""
    return ("heal",) if context.prepared.heal else ("quantize",)


def converted_key(context: RunContext, *, name: str) -> str:
    """Digest of what is converted, and into which format."""
    p = context.prepared
    source, ends = context.keys.heal if p.heal else context.keys.quantize, p.quantize.ends.of(name)
    return key_of(source, "convert", name, *([asdict(ends)] if ends else []))


def run_convert(context: RunContext, key: str, *, name: str) -> ConvertedFacts:
    """Write the artifact of one format, its codes those of the checkpoint that is deployed.

    Returns size and verification, for the report.
    """
    p, trust = context.prepared, context.recipe.trust_remote_code
    source = context.directory.path / ("healed" if p.heal else "gptq")
    artifact, ends = context.directory.artifact(name), p.quantize.ends.of(name)
    out = artifact.begin(key)
    done: Conversion | gguf_export.GgufExport
    if name == gguf_export.FORMAT:
        done = gguf_export.export_into(
            out, source, ends=ends, trust_remote_code=trust, progress=context.watcher.progress
        )
        proof = verify_gguf(out / done.file, doing=context.watcher.doing)
    else:
        done = convert_into(out, source, name, ends=ends, trust_remote_code=trust, progress=context.watcher.progress)
        proof = deploy.verify(
            out, deploy=p.quantize.served_as(name, context.recipe.deploy), own_device=context.device,
            trust_remote_code=trust, ranks=context.ranks, doing=context.watcher.doing,
        )  # fmt: skip
    proof.raise_if_wrong()
    artifact.finish(key, {"stage": "convert", "requant": __version__, "from": source.name})
    return {
        "made_from": source.name,
        "bytes": done.nbytes[1],
        "largest_rounding": done.largest_rounding,
        "ends": dict(done.ends),
        "verify": proof.facts(),
    }
