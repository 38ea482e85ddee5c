"""`Verification`: what was checked of one checkpoint, and what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from requant.checkpoint.artifact import read_manifest
from requant.checkpoint.atomic_write import read_state
from requant.checkpoint.model_files import write_json
from requant.checkpoint.reader import read_json
from requant.checkpoint.run_directory import MARKER, sealed, unsealed
from requant.errors import StageError
from requant.formats.quantized_format import Finding
from requant.formats.registry import FORMATS

SHOWN = 20  # findings in a message
RESULTS = {"quantize": "verify-gptq.json", "heal": "verify-healed.json"} | {
    name: f"verify-{name}.json" for name in (*FORMATS, "gguf") if name != "gptq"
}  # by the stage that wrote the checkpoint


class EngineResult(TypedDict):
    """One engine's row.

    difference: of mean -ln p in nats, theirs minus ours. tolerance: what its dtype explains.
    delta to n_tokens: as `requant_eval.metrics.engine_step` pairs it with us; only if the engine loaded.
    """

    engine: str
    dtype: str
    device: str
    kernels: list[str]
    versions: dict[str, str]
    load_seconds: float | None
    error: str | None
    tolerance: float
    perplexity: float | None
    difference: float | None
    same_tokens: bool | None
    tokens_per_second: float | None
    delta: NotRequired[dict[str, float | None]]
    loss_percent: NotRequired[dict[str, float | None]]
    n_documents: NotRequired[int]
    n_tokens: NotRequired[int]
    ok: NotRequired[bool]


@dataclass(kw_only=True)
class Verification:
    """What was checked and what was found; `ok` when nothing is wrong.

    expected_bytes: of all tensors as the config describes them. disk_bytes: of the safetensors files.
    perplexity: of the sample, decoded by us in fp32. sample_set, sample_digest: the evaluation set of the sample.
    largest_rounding: of a GGUF file's weight, in steps of its scale. skipped: checks that could not be made, and why.
    carried: module that only servers run -> number of its tensors, which are copies.
    """

    path: Path
    findings: list[Finding] = field(default_factory=list)
    tensors: int = 0
    linears: int = 0
    bits_per_weight: float | None = None
    expected_bytes: int | None = None
    disk_bytes: int | None = None
    negative_scales: int | None = None
    relative_error: float | None = None
    largest_rounding: float | None = None
    sample_tokens: int = 0
    sample_set: str | None = None
    sample_digest: str | None = None
    perplexity: float | None = None
    generated: list[int] = field(default_factory=list)
    text: str | None = None
    engines: list[EngineResult] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    carried: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing wrong was found."""
        return not self.findings

    def facts(self) -> VerificationFacts:
        """JSON types, without the path."""
        raw = asdict(self)
        del raw["path"]
        return cast(VerificationFacts, {"ok": self.ok} | raw)

    def message(self) -> str:
        """The findings, one a line."""
        more = len(self.findings) - SHOWN
        lines = [f"{self.path}: {len(self.findings)} things are wrong:" if len(self.findings) > 1 else f"{self.path}:"]
        lines += [f"  {finding}" for finding in self.findings[:SHOWN]]
        return "\n".join([*lines, f"  and {more} more"] if more > 0 else lines)

    def raise_if_wrong(self) -> None:
        """Raise StageError with the findings, if there are any."""
        if not self.ok:
            raise StageError(self.message())


class FindingFacts(TypedDict):
    """A `Finding` as stored. where: a tensor name, or `file: key`."""

    where: str
    reason: str


class VerificationFacts(TypedDict):
    """A `Verification` as stored, without the path."""

    ok: bool
    findings: list[FindingFacts]
    tensors: int
    linears: int
    bits_per_weight: float | None
    expected_bytes: int | None
    disk_bytes: int | None
    negative_scales: int | None
    relative_error: float | None
    sample_tokens: int
    sample_set: str | None
    sample_digest: str | None
    perplexity: float | None
    generated: list[int]
    text: str | None
    engines: list[EngineResult]
    skipped: list[str]
    carried: NotRequired[dict[str, int]]
    largest_rounding: NotRequired[float | None]


def save_verification(done: Verification) -> Path | None:
    """Save the result beside a run's checkpoint, for its report.

    None when `path`, or the directory of a file, is no artifact of a run.
    """
    artifact = (done.path if done.path.is_dir() else done.path.parent).absolute()
    run, manifest = artifact.parent, read_manifest(artifact)
    file = run / f"verify-{artifact.name}.json"
    if not (run / MARKER).exists() or manifest is None or file.name not in RESULTS.values():
        return None
    write_json(file, sealed({"key": manifest["key"], **done.facts()}))
    return file


def _unsealed(file: Path) -> dict[str, Any]:
    return unsealed(read_json(file, constants=True))


def saved_verifications(run: Path, keys: Mapping[str, str]) -> dict[str, VerificationFacts]:
    """Stage -> the saved verification of its checkpoint.

    keys: stage -> key of the checkpoint that counts.
    """
    saved = {stage: read_state(run / RESULTS[stage], _unsealed) or {} for stage in keys}
    return {
        stage: cast(VerificationFacts, {k: v for k, v in result.items() if k != "key"})
        for stage, result in saved.items()
        if result.get("key") == keys[stage]
    }
