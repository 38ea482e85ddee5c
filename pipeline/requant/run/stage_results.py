"""Stored results of the stages in `.stages.json`; keys may be missing in an older run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Required, TypedDict

from requant.deploy.verification import VerificationFacts
from requant.evaluate.adapter_probe import ProbeFacts
from requant.evaluate.merge_onto_probe import Onto
from requant.evaluate.roads import RoadFacts
from requant.heal.stage import HealResult
from requant.merge.plan import Ledger
from requant.merge.selftest import SelfTestFacts
from requant.quantize.module_results import ModuleRow


class Measured(TypedDict, total=False):
    """Wall seconds, peak resident bytes, peak bytes of the GPU (absent without one)."""

    seconds: float
    peak_rss: int
    peak_device: int


class EstimateFacts(TypedDict):
    """`requant_eval.metrics.statistics.Estimate` as stored: a value and its 95 % interval."""

    value: float
    se: float
    low: float
    high: float


class OntoFacts(TypedDict):
    """Losses of both merges on a part of one evaluation set, in nats a token.

    difference: the original's minus the other's, paired by document. se, interval: its standard error and (low, high)
    at 95 %; None with one document.
    """

    set: str
    documents: int
    tokens: int
    losses: dict[Onto, float]
    difference: float
    se: float | None
    interval: tuple[float, float] | None


class OntoDecision(TypedDict):
    """The base that is taken, and why. difference, interval: the mean over the sets; None where no set tells."""

    onto: Onto
    why: str
    difference: float | None
    interval: tuple[float, float] | None
    sets: list[OntoFacts]


class BudgetUnit(TypedDict):
    """Linears that share a width. weights: how many. losses: nats a token when they alone are rounded, by width."""

    pattern: str
    bits: int
    weights: int
    losses: list[float]


class BudgetDecision(TypedDict):
    """What `quantize.budget` gave. asked, mean: bits of codes a weight. widths: of `BudgetUnit.losses`."""

    asked: float
    mean: float
    why: str
    widths: list[int]
    units: list[BudgetUnit]


class MergeFacts(TypedDict, total=False):
    """`merge.stage.MergeResult` as stored, and the self-test."""

    dtype: str
    why: str
    onto: str
    ledger: Ledger
    untrained: list[str]
    max_abs: float
    bytes: int
    carried: dict[str, int]
    stop_tokens: str | None
    warnings: list[str]
    selftest: SelfTestFacts


class MergeStageResult(MergeFacts, Measured, total=False):
    """Facts of the merge, and what it cost."""


class QuantizeStageResult(Measured, total=False):
    """Linears, those left in 16 bit, and the verification."""

    modules: list[ModuleRow]
    bits_per_weight: float
    left: list[str]
    verify: VerificationFacts
    notes: list[str]


class EvaluateStageResult(Measured, total=False):
    """Variants that were scored by the last run, those of them that were streamed, and notes."""

    variants: list[str]
    streamed: list[str]
    notes: list[str]


class TasksStageResult(Measured, total=False):
    """Variants that the last run asked tasks of, those that could not be (and why), and notes."""

    variants: list[str]
    missing: dict[str, str]
    notes: list[str]


class GptqmodelResult(Measured, total=False):
    """The checkpoint by gptqmodel's defaults. failed: why there is none. again: the next run tries again."""

    made: Required[RoadFacts | None]
    failed: str
    again: bool


class RoadsResult(Measured, total=False):
    """Roads that were scored, by name. missing: why another was not. again: of these, those to try in the next run.

    notes: e.g. smaller batches.
    """

    roads: Required[dict[str, RoadFacts]]
    missing: Required[dict[str, str]]
    again: Required[list[str]]
    streamed: Required[list[str]]
    notes: Required[list[str]]


class RoadOfReport(TypedDict):
    """Another way to ship, for the report. bytes, unquantized: None where it was not measured; missing says why."""

    name: str
    by: str
    settings: str
    bytes: int | None
    unquantized: int | None
    missing: str | None


class ProbeResult(TypedDict, total=False):
    """The adapter's loss on its own text: one row a source, a sentence, warnings."""

    probes: list[ProbeFacts]
    said: str
    warnings: list[str]


class PredictionFacts(TypedDict):
    """`check.delta_prediction.Prediction` as stored."""

    grid: str
    retention: EstimateFacts
    relative_delta: float
    relative_error: float
    modules: int
    blocks: Sequence[str]
    others: dict[str, EstimateFacts]
    seconds: float


class PredictionResult(TypedDict):
    """How much of the adapter's delta rounding keeps, None when no delta is quantized."""

    prediction: PredictionFacts | None


class HealedFacts(HealResult):
    """A healing in a run. data: names of its texts. target: the variant that is the teacher."""

    data: list[str]
    target: str
    verify: VerificationFacts


class HealStageResult(HealedFacts, Measured):
    """Facts of the healing, and what it cost."""


class Sample(TypedDict):
    """Size of the sample on which candidates are measured."""

    windows: int
    tokens: int


class Distance(TypedDict):
    """KL divergence and difference of the loss between two models, nats a token."""

    kl: EstimateFacts
    nll: EstimateFacts


class SuggestedUnit(TypedDict):
    """`suggest.Candidate` as stored, without its grid.

    gain: the distance from the merged model that its swap removes.
    """

    pattern: str
    modules: Sequence[str]
    bits: int
    bytes: int
    signal_to_noise: float | None
    relative_error: float
    from_bits: int
    gain: Distance
    helps: bool


class SuggestStageResult(Measured):
    """Candidates, the best first, and the patch of the recipe that lifts those that help.

    before: the quantized model's distance from the merged one.
    """

    sample: Sample
    before: Distance
    units: list[SuggestedUnit]
    patch: str


class ConvertedFacts(TypedDict):
    """The checkpoint in another format.

    made_from: the artifact. bytes: of its tensors. largest_rounding: of a weight, in steps of its scale. ends: bits of
    quantized embeddings and head, by module. verify: of this one.
    """

    made_from: str
    bytes: int
    largest_rounding: float
    ends: dict[str, int]
    verify: VerificationFacts


class StageResults(TypedDict, total=False):
    """Stage -> its stored result, as the report needs them."""

    merge: MergeStageResult
    quantize: QuantizeStageResult
    evaluate: EvaluateStageResult
    tasks: TasksStageResult
    heal: HealStageResult
    roads: RoadsResult
    gptqmodel: GptqmodelResult
    probe: ProbeResult
    resonance: PredictionResult


class Event(TypedDict, total=False):
    """One line of events.jsonl. event: start or done. time: seconds since 1970."""

    time: float
    event: str
    stage: str
    seconds: float
    peak_rss: int
