"""What quantizing a block's linears cost: gathered on the device, read once that can be had without waiting for it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, replace

import torch
from torch import Tensor

from requant.gptq import Solution
from requant.results import ModuleResult
from requant.staging import sent
from requant.survival import Survival

log = logging.getLogger(__name__)
Added = Callable[[str], float]
"""A linear of the block, by its full name -> the share of its calibration rows that were added to it."""


class Costs:
    """One block's. After `send` they travel to the host, and `results` waits for these alone."""

    def __init__(self) -> None:
        self.made: list[tuple[str, Solution, bool]] = []  # name, what is small of a solution, whether it has a delta
        self.numbers: list[Tensor] = []
        self.arrived: Callable[[], Tensor] | None = None

    def add(self, name: str, solution: Solution, measured: Tensor | None) -> None:
        """One linear; measured: of its delta, by `survival.measure`. Nothing is waited for."""
        small = replace(solution, codes=solution.codes.new_empty(0))  # no view: that would keep all of them
        self.made.append((name, small, measured is not None))
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
        return [self._result(*made, numbers, added) for made in self.made]

    def _read(self) -> Tensor:
        if self.arrived is None:
            raise RuntimeError("costs are read before they were sent")
        return self.arrived()

    @staticmethod
    def _result(name: str, solution: Solution, measured: bool, numbers: list[float], added: Added) -> ModuleResult:
        """Takes its numbers from the front of all that are left."""
        losses, grid = solution.losses(_first(numbers, 4)), solution.grid
        adapted = asdict(Survival.of(_first(numbers, 4), losses.loss)) if measured else {}
        if losses.fallback:
            log.warning("%s: rounded without error feedback (damp %.2f)", name, solution.damp)
        return ModuleResult(
            name, grid.bits, grid.group_size, losses.loss, losses.relative, losses.rtn_relative, solution.damp, solution.order,
            losses.fallback, **adapted, added=added(name),
        )  # fmt: skip


def _first(numbers: list[float], count: int) -> list[float]:
    """Taken off."""
    taken = numbers[:count]
    del numbers[:count]
    return taken
