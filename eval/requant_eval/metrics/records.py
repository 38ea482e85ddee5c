"""What an evaluation set's section of `report.json` contains: the parts of its JSON Schema.

Docstrings are descriptions in the schema: their bytes are part of `requant schema --report` and do not change.
Unknown keys are allowed; numbers are null where nothing is known.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

Kind = Literal["learned", "merge", "quantize", "heal", "ends", "total", "control", "fork", "road"]
Part = Literal["value", "low", "high"]
Field = Literal["value", "se", "low", "high"]
PARTS: tuple[Part, ...] = ("value", "low", "high")
FIELDS: tuple[Field, ...] = ("value", "se", "low", "high")


class Estimate(TypedDict):
    """A value, its standard error and its 95 % interval in one unit."""

    value: float | None
    se: float | None
    low: float | None
    high: float | None


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """The same estimate in another unit."""
    out = estimate.copy()
    for field in FIELDS:
        value = estimate[field]
        out[field] = None if value is None else factor * value
    return out


class VariantResult(TypedDict):
    """One variant on one set. mean_nll: nats a token. top1_accuracy: a share. seconds: scoring."""

    name: str
    n: int
    mean_nll: Estimate
    ppl: Estimate
    bits_per_byte: Estimate | None
    top1_accuracy: Estimate
    seconds: float


class Ladder(TypedDict):
    """KL(reference || variant), nats a token."""

    mean: Estimate
    median: float
    p90: float
    p95: float
    p99: float
    p99_9: float
    max: float


Edge = TypedDict(
    "Edge",
    {
        "from": str,
        "to": str,
        "kind": Kind,
        "delta": Estimate,
        "loss_percent": Estimate,
        "naive_se": float | None,
        "design_effect": float | None,
        "kl": Ladder | None,
        "agreement": Estimate | None,
        "right_to_wrong": Estimate,
        "wrong_to_right": Estimate,
    },
)
Edge.__doc__ = "One step, paired. delta: ln perplexity, nats a token. agreement and flips: shares of tokens."


KernelStep = TypedDict(
    "KernelStep",
    {
        "from": str,
        "to": str,
        "kind": Literal["kernel"],
        "delta": Estimate,
        "loss_percent": Estimate,
        "n_documents": int,
        "n_tokens": int,
        "dtype": str,
        "device": str,
    },
)
KernelStep.__doc__ = "The step into an engine that serves the checkpoint, paired on the beginnings of some documents."


class Group(TypedDict):
    """Tokens that the adapter changed about as much: low..high is |ln p_adapter - ln p_base|, nats."""

    n: int
    low: float
    high: float


class VariantTails(TypedDict):
    """reverted: share of the adapter's changes taken back. last_share: of the loss, what is in the last group. The rest
    by group: nats a token, a share.
    """

    reverted: Estimate | None
    last_share: Estimate | None
    loss: list[Estimate]
    kl: list[Estimate] | None
    disagreement: list[Estimate] | None


class PairedLoss(TypedDict):
    """Loss of one way to compute a variant against another, paired. delta: ln perplexity, nats a token."""

    delta: Estimate
    loss_percent: Estimate
    n_documents: int
    n_tokens: int


class Tails(TypedDict):
    """Groups of tokens, least changed by the adapter first, and every variant on them."""

    groups: list[Group]
    variants: dict[str, VariantTails]


class Documents(TypedDict):
    """Sums over each document of one variant's tokens: what `compare` pairs. nll, kl: nats; the rest: counts."""

    n: list[int]
    nll: list[float]
    top1: NotRequired[list[int]]
    kl: NotRequired[list[float]]
    agree: NotRequired[list[int]]
    right_to_wrong: NotRequired[list[int]]
    wrong_to_right: NotRequired[list[int]]


class EvaluationSet(TypedDict):
    """One evaluation set. digest: sha256 of its token ids; fingerprint: with the protocol."""

    name: str
    digest: str
    protocol: str
    window: int
    bos: bool
    n_documents: int
    n_scored: int
    n_bytes: int
    dropped: int
    in_domain: bool
    fingerprint: str
    few_documents: bool
    reference: str | None
    variants: list[VariantResult]
    edges: list[Edge]
    kernels: NotRequired[list[KernelStep]]
    retention: dict[str, Estimate | None]
    tails: Tails | None
    documents: dict[str, Documents]
