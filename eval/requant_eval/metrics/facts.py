"""What the report reads of a run's facts: every key optional, others kept as they are.

`facts` is free in the JSON Schema of the report: these types are for its readers, `known_facts` gives it them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Required, cast

from typing_extensions import ReadOnly, TypedDict

from requant_eval.metrics.records import Estimate


class ModuleFacts(TypedDict, total=False):
    """What the report reads of one quantized module's row; a run stores more (`quantize.ModuleRow`).

    A value that was not measured is missing or None. E: quantization error, dW: the adapter's delta, H: Hessian.

    loss: tr(E H E'). relative_error: sqrt(tr(E H E') / tr(W H W')). rtn_error: the same of rounding to nearest.
    signal: tr(dW H dW'). signal_to_noise: signal / loss. retention, output_retention: of the delta and its output.
    """

    name: ReadOnly[str]
    bits: ReadOnly[int]
    group_size: ReadOnly[int]
    loss: ReadOnly[float]
    relative_error: ReadOnly[float | None]
    rtn_error: ReadOnly[float | None]
    damp: ReadOnly[float]
    fallback: ReadOnly[bool]
    signal: ReadOnly[float | None]
    signal_to_noise: ReadOnly[float | None]
    retention: ReadOnly[float | None]
    output_retention: ReadOnly[float | None]
    delta_norm: ReadOnly[float | None]


class PredictionFacts(TypedDict):
    """The delta's retention as predicted from a sample of the weights.

    relative_delta: size of the delta against the weights.
    """

    retention: Estimate
    modules: int
    blocks: Sequence[str]
    relative_delta: float


class QuantizeFacts(TypedDict, total=False):
    """Quantization: settings and one row a module."""

    settings: Mapping[str, Any]
    bits_per_weight: float | None
    modules: Sequence[ModuleFacts]
    resonance: PredictionFacts | None


class EngineFacts(TypedDict, total=False):
    """An engine that loaded the checkpoint, or why it did not (error).

    difference: of the mean loss, nats, the engine's minus ours. delta to n_tokens: paired (`PairedLoss`).
    """

    engine: str
    dtype: str
    device: str
    kernels: Sequence[str]
    versions: Mapping[str, str]
    load_seconds: float
    error: str | None
    ok: bool
    perplexity: float
    difference: float
    tolerance: float
    tokens_per_second: float | None
    delta: Estimate | None
    loss_percent: Estimate
    n_documents: int
    n_tokens: int


class ProofFacts(TypedDict, total=False):
    """The result of verifying a checkpoint. sample: the tokens whose perplexity was computed."""

    perplexity: float | None
    sample_tokens: int
    sample_set: str | None
    sample_digest: str | None
    tensors: int
    linears: int
    engines: Sequence[EngineFacts]


class HealSource(TypedDict):
    """One source of the healing text. held: [steps, KL, loss] on its windows that choose, in nats a token."""

    name: str
    reads: float | None
    held: Sequence[Sequence[float]]
    worse: bool


class ChangedCodes(TypedDict):
    """Codes that healing changed. share: of all. by: how many by distance."""

    share: float
    codes: int
    by: Mapping[str, int]


class HealedBlock(TypedDict):
    """One block of a healing block by block. start, best: relative error before and after. changed: share of codes."""

    block: int
    start: float
    best: float
    best_step: int
    changed: float | None


class HealPass(TypedDict):
    """One of two passes. healed: whether it was kept. KL of what it began with and of what it left."""

    mode: str
    tuned: Sequence[str]
    healed: bool
    kl_start: float
    kl_best: float


class HealFacts(TypedDict, total=False):
    """Healing. held: (steps, KL in nats a token on the windows that choose a step).

    judged: the KL of the start and of the chosen step on windows not looked at before; None: there were none.
    """

    held: Sequence[tuple[float, float | None]]
    best_step: int
    chosen_step: int
    judged: Sequence[float | None] | None
    judge_windows: int
    sources: Sequence[HealSource]
    changed_codes: ChangedCodes | None
    blocks: Sequence[HealedBlock]
    passes: Sequence[HealPass]
    verify: ProofFacts | None


class FormatFacts(TypedDict, total=False):
    """The deployed checkpoint in one format (`run.format_facts.FormatFacts`). bytes: of its weights' files.

    read_by: engines, by the engine table. made_from: the directory whose weights it has, None: it was solved.
    largest_rounding: of a weight, in steps of its scale. ends: bits of quantized embeddings and head, by module.
    loaded_in: engines that loaded it.
    """

    directory: str
    bytes: int
    bits_per_weight: float | None
    read_by: Sequence[str]
    made_from: str | None
    largest_rounding: float
    ends: Mapping[str, int]
    loaded_in: Sequence[str]


class RoadFacts(TypedDict, total=False):
    """Another way to ship. by: who computed it. bytes, unquantized: of its tensors on disk, and of those in 16 bit.

    missing: why it was not measured.
    """

    name: Required[str]
    by: Required[str]
    settings: str
    bytes: int | None
    unquantized: int | None
    missing: str | None


class CostFacts(TypedDict, total=False):
    """bytes: of every artifact. The rest by stage: seconds, peak bytes of memory and GPU memory."""

    bytes: Mapping[str, int | None]
    seconds: Mapping[str, float]
    peak_rss: Mapping[str, float]
    peak_device: Mapping[str, float]


class CanaryRow(TypedDict):
    """One prompt, its answer, what every variant gave and whether that is right."""

    prompt: str
    answer: str
    given: Mapping[str, str]
    right: Mapping[str, bool]


class CanaryFacts(TypedDict):
    """The canaries' answers (`scoring.canaries.result`). right: by variant, of total."""

    rule: str
    total: int
    right: Mapping[str, int]
    items: Sequence[CanaryRow]


class Gain(TypedDict):
    """What is gained where some modules are not quantized. kl: nats a token."""

    kl: Estimate


class UnitFacts(TypedDict):
    """Modules that could get more bits. bytes: larger by. helps: whether the gain is sure."""

    pattern: str
    from_bits: int
    bits: int
    signal_to_noise: float | None
    relative_error: float | None
    gain: Gain
    bytes: int
    helps: bool


class SampleFacts(TypedDict):
    """The text that gains were measured on."""

    tokens: int


class SuggestionFacts(TypedDict):
    """Modules worth more bits. patch: YAML for the recipe. before: the loss of the whole checkpoint."""

    units: Sequence[UnitFacts]
    patch: str
    before: Gain
    sample: SampleFacts


class OverlapFacts(TypedDict, total=False):
    """What the report reads of the calibration text. overlap: set -> share of its 13-grams in the text."""

    overlap: Mapping[str, float]


class EvaluationFacts(TypedDict, total=False):
    """How variants were scored. runtimes: by variant, what ran it."""

    runtimes: Mapping[str, str]


class Facts(TypedDict, total=False):
    """Everything a run says besides scores. base, adapter: a name, or a mapping with one. recipe: YAML."""

    name: str | None
    created: str | None
    recipe: str
    base: str | Mapping[str, Any]
    adapter: str | Mapping[str, Any]
    merge: Mapping[str, Any]
    quantize: QuantizeFacts
    verify: ProofFacts | None
    calibration: OverlapFacts
    heal: HealFacts | None
    formats: Mapping[str, FormatFacts]
    cost: CostFacts
    roads: Sequence[RoadFacts]
    evaluation: EvaluationFacts
    versions: Mapping[str, str]
    hardware: Mapping[str, str]
    warnings: Sequence[str]
    canaries: CanaryFacts | None
    suggestion: SuggestionFacts | None


def known_facts(facts: Mapping[str, Any]) -> Facts:
    """The same facts, typed for readers; nothing is checked."""
    return cast("Facts", facts)


def is_16_bit_base(facts: Mapping[str, Any]) -> bool:
    """Whether training held the base in 16 bit, as a run with `base.nf4: none` says."""
    base = facts.get("base")
    return isinstance(base, Mapping) and base.get("nf4") == "none"


def base_and_adapter(facts: Mapping[str, Any]) -> str:
    """The reference in words: "base + adapter", "16-bit base + adapter"."""
    return "16-bit base + adapter" if is_16_bit_base(facts) else "base + adapter"
