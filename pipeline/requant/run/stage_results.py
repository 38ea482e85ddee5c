"""Stored results of the stages in `.stages.json`; keys may be missing in an older run."""

from __future__ import annotations

from typing import Any, TypedDict

from requant.quantize.module_results import ModuleRow


class Measured(TypedDict, total=False):
    """Wall seconds, peak resident bytes, peak bytes of the GPU (absent without one)."""

    seconds: float
    peak_rss: int
    peak_device: int


class MergeStageResult(Measured, total=False):
    """`merge.stage.MergeResult`, and the self-test as `merge.selftest.SelfTest`."""

    dtype: str
    why: str
    ledger: dict[str, Any]
    untrained: list[str]
    max_abs: float
    bytes: int
    warnings: list[str]
    selftest: dict[str, Any]


class QuantizeStageResult(Measured, total=False):
    """Linears, those left in 16 bit, and the verification as `deploy.verification.Verification`."""

    modules: list[ModuleRow]
    bits_per_weight: float
    left: list[str]
    verify: dict[str, Any]
    notes: list[str]


class EvaluateStageResult(Measured, total=False):
    """Variants that were scored by the last run, those of them that were streamed, and notes."""

    variants: list[str]
    streamed: list[str]
    notes: list[str]


class ProbeResult(TypedDict, total=False):
    """The adapter's loss on its own text: one row a source, a sentence, warnings."""

    probes: list[dict[str, Any]]
    said: str
    warnings: list[str]


class PredictionResult(TypedDict):
    """`check.delta_prediction.Prediction`, None when no delta is quantized."""

    prediction: dict[str, Any] | None


class StageResults(TypedDict, total=False):
    """Stage -> its stored result, as the report needs them.

    heal: as `heal.heal` returns it, and its verification.
    """

    merge: MergeStageResult
    quantize: QuantizeStageResult
    evaluate: EvaluateStageResult
    heal: dict[str, Any]
    probe: ProbeResult
    resonance: PredictionResult


class Event(TypedDict, total=False):
    """One line of events.jsonl. event: start or done. time: seconds since 1970."""

    time: float
    event: str
    stage: str
    seconds: float
    peak_rss: int
