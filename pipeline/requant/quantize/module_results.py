"""Loss and delta retention of linears, summed on the device and copied asynchronously."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TypedDict, cast

import torch
from torch import Tensor

from requant.numerics.delta_retention import DeltaRetention
from requant.numerics.grid import Grid
from requant.numerics.solution import Losses, Solution
from requant.runtime.pinned_memory import copy_to_host_async

log = logging.getLogger(__name__)
Added = Callable[[str], float]
"""A linear of the block, by its full name -> the share of its calibration rows that were added to it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _LinearFacts:
    """The host's part of a linear's result, without tensors.

    measured: whether the adapter changed the linear, so that four more numbers follow.
    """

    name: str
    grid: Grid
    damp: float
    order: str
    uncoupled: bool
    measured: bool


class BlockResults:
    """The numbers of one block: `send` starts their copy to the host, `results` waits for it."""

    def __init__(self) -> None:
        self.linears: list[_LinearFacts] = []
        self.numbers: list[Tensor] = []
        self.arrived: Callable[[], Tensor] | None = None

    def add(self, name: str, solution: Solution, distance: Tensor, measured: Tensor | None) -> None:
        """Add one linear, without synchronization.

        distance: of the solution from the source's weight, relative. measured: the numbers of its adapter delta, from
        `delta_retention.measure`; None without a delta.
        """
        self.linears.append(
            _LinearFacts(
                name=name,
                grid=solution.grid,
                damp=solution.damp,
                order=solution.order,
                uncoupled=solution.uncoupled,
                measured=measured is not None,
            )
        )
        self.numbers += [solution.sums().double(), solution.checksum()[None], distance.double()[None]]
        if measured is not None:
            self.numbers.append(measured)

    def send(self, total: Tensor) -> None:
        """Start to copy the numbers to the host.

        total: the sum of all outputs of the block, a scalar on the device: finite exactly where all outputs are.
        """
        self.arrived = copy_to_host_async(torch.cat([total.double()[None], *self.numbers]))
        self.numbers.clear()

    def finite(self) -> bool:
        """Whether all outputs of the block are finite; waits for the copy."""
        return bool(torch.isfinite(self._read()[0]))

    def results(self, added: Added) -> list[ModuleResult]:
        """The results of all linears; waits for the copy."""
        numbers = self._read()[1:].tolist()
        return [_result(linear, numbers, added) for linear in self.linears]

    def _read(self) -> Tensor:
        if self.arrived is None:
            raise RuntimeError("results are read before they were sent")
        return self.arrived()


def _result(facts: _LinearFacts, numbers: list[float], added: Added) -> ModuleResult:
    """The result of one linear; its numbers are removed from the front of `numbers`."""
    losses = Losses.of(_take(numbers, 4), uncoupled=facts.uncoupled)
    checksum, distance = _take(numbers, 2)
    adapted = asdict(DeltaRetention.of(_take(numbers, 4), losses.loss)) if facts.measured else {}
    if losses.fallback:
        log.warning("%s: rounded without error feedback (damp %.2f)", facts.name, facts.damp)
    return ModuleResult(
        name=facts.name,
        bits=facts.grid.bits,
        group_size=facts.grid.group_size,
        loss=losses.loss,
        relative_error=losses.relative,
        rtn_error=losses.rtn_relative,
        damp=facts.damp,
        order=facts.order,
        fallback=losses.fallback,
        added=added(facts.name),
        checksum=int(checksum),
        distance=distance,
        **adapted,
    )


def _take(numbers: list[float], count: int) -> list[float]:
    """The first `count` numbers, removed from the list."""
    taken = numbers[:count]
    del numbers[:count]
    return taken


@dataclass(frozen=True, kw_only=True, slots=True)
class ModuleResult:
    """Error of one quantized linear on the calibration text.

    The error E is against the weight W that codes were solved for. With `correct`, W is the corrected weight: the
    correction itself is not counted as an error.
    loss: tr(E H E'). relative_error: sqrt(tr(E H E') / tr(W H W')). rtn_error: relative_error of rounding W to nearest
    on min-max scales. added: share of an expert's calibration rows that were not routed to it, because too few were.
    checksum: of codes, scales and zero points (`solution.checksum`), which the file must decode to. distance: of what
    was solved from the source's weight W, |Q - W| / |W|. None from an engine that does not tell.
    The other fields compare the adapter's delta with the same error (`delta_retention`); None without a delta.
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
    checksum: int | None = None
    distance: float | None = None

    def row(self) -> ModuleRow:
        """As stored in JSON."""
        return cast(ModuleRow, asdict(self))


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
    checksum: int | None
    distance: float | None
