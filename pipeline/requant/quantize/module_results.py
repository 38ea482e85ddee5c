"""Loss and delta retention of linears, summed on the device and copied asynchronously."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypedDict

import torch
from torch import Tensor

from requant.numerics.delta_retention import Survival
from requant.numerics.gptq import Losses, Solution
from requant.numerics.grid import Grid
from requant.runtime.pinned_memory import sent

log = logging.getLogger(__name__)
Added = Callable[[str], float]
"""A linear of the block, by its full name -> the share of its calibration rows that were added to it."""


@dataclass(frozen=True, slots=True)
class _Made:
    """What the host knows of a solution, without its tensors. measured: whether it has a delta."""

    name: str
    grid: Grid
    damp: float
    order: str
    uncoupled: bool
    measured: bool


class BlockResults:
    """The numbers of one block: `send` starts their copy to the host, `results` waits for it."""

    def __init__(self) -> None:
        self.made: list[_Made] = []
        self.numbers: list[Tensor] = []
        self.arrived: Callable[[], Tensor] | None = None

    def add(self, name: str, solution: Solution, measured: Tensor | None) -> None:
        """One linear; measured: of its delta, by `survival.measure`. Nothing is waited for."""
        self.made.append(
            _Made(name, solution.grid, solution.damp, solution.order, solution.uncoupled, measured is not None)
        )
        self.numbers.append(solution.sums().double())
        if measured is not None:
            self.numbers.append(measured)

    def send(self, total: Tensor) -> None:
        """total: of all that the block has put out, [] on the device: finite where all of it is."""
        self.arrived = sent(torch.cat([total.double()[None], *self.numbers]))
        self.numbers.clear()

    def finite(self) -> bool:
        return bool(torch.isfinite(self._read()[0]))

    def results(self, added: Added) -> list[ModuleResult]:
        numbers = self._read()[1:].tolist()
        return [_result(made, numbers, added) for made in self.made]

    def _read(self) -> Tensor:
        if self.arrived is None:
            raise RuntimeError("costs are read before they were sent")
        return self.arrived()


def _result(made: _Made, numbers: list[float], added: Added) -> ModuleResult:
    """Takes its numbers from the front of all that are left."""
    losses = Losses(made.uncoupled, *_first(numbers, 4))
    adapted = asdict(Survival.of(_first(numbers, 4), losses.loss)) if made.measured else {}
    if losses.fallback:
        log.warning("%s: rounded without error feedback (damp %.2f)", made.name, made.damp)
    return ModuleResult(
        name=made.name,
        bits=made.grid.bits,
        group_size=made.grid.group_size,
        loss=losses.loss,
        relative_error=losses.relative,
        rtn_error=losses.rtn_relative,
        damp=made.damp,
        order=made.order,
        fallback=losses.fallback,
        added=added(made.name),
        **adapted,
    )


def _first(numbers: list[float], count: int) -> list[float]:
    """Taken off."""
    taken = numbers[:count]
    del numbers[:count]
    return taken


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleResult:
    """Error of one quantized linear on the calibration text, against the weight it was solved for.

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


class ModuleRow(TypedDict, total=False):
    """A `ModuleResult` as stored in JSON; an older run may lack keys."""

    name: str
    bits: int
    group_size: int
    loss: float
    relative_error: float
    rtn_error: float
    damp: float
    order: str
    fallback: bool
    delta_norm: float | None
    signal: float | None
    signal_to_noise: float | None
    retention: float | None
    output_retention: float | None
    added: float
