"""What quantizing one linear cost: a row of the report, kept with each finished block."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """What quantizing one linear cost on the calibration text, against the weight it was solved for.

    loss: tr(E H E'). relative_error: sqrt(tr(E H E') / tr(W H W')). With `correct`, W is the corrected weight: what it makes
    up for is not counted as an error. rtn_error: the same for rounding W to nearest on min-max scales.
    added: share of an expert's calibration rows that were not routed to it, because too few were.
    The rest, of the adapter's delta against the same error, is described in `survival`; None without a delta.
    """

    name: str
    bits: int
    group_size: int
    loss: float
    relative_error: float
    rtn_error: float
    damp: float
    order: str
    fallback: bool
    delta_norm: float | None = None
    signal: float | None = None
    signal_to_noise: float | None = None
    retention: float | None = None
    output_retention: float | None = None
    added: float = 0.0
