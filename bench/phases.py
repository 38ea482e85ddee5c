"""Time on a GPU by phase of quantization, for `bench/speed.py`."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import watched

PHASES = {  # function of ours -> phase, without what the others inside of it take
    "numerics.hessian.gather": "forward to the stages",
    "numerics.hessian.add_to_hessian": "hessian",
    "numerics.hessian.add_drift": "drift",
    "numerics.gptq.factorize": "factor",
    "numerics.grid.find_scales": "scale search",
    "numerics.gptq.solve": "column loop",
    "numerics.gptq.refine": "sweeps",
    "quantize.error_correction.Correction.corrected": "correction",
    "numerics.gptq.row_errors": "losses",
    "quantize.background_writer._packed": "pack",
    "runtime.ranks.DistributedRanks.all_reduce": "sums of all ranks",
    "runtime.ranks.DistributedRanks.all_gather_rows": "rows of all ranks",
}
BESIDE = "pack"  # what other threads do too; elsewhere they only compile
Span = tuple[Any, Any]


class Phases:
    """Device time spent in our functions, by events on the stream: nothing waits while it runs."""

    def __init__(self) -> None:
        self.spans: dict[str, list[Span]] = defaultdict(list)
        self.inside: dict[str, list[Span]] = defaultdict(list)  # spans of other phases in those of a phase
        self.open: list[str] = []

    def watch(self) -> None:
        import requant.quantize  # noqa: F401 - all that it calls

        watched.watch(PHASES, self._phase)

    @contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        mine = threading.current_thread() is threading.main_thread()
        if not mine and phase != BESIDE:
            yield
            return
        if mine:
            self.open.append(phase)
        start = self._mark()
        try:
            yield
        finally:
            span = start, self._mark()
            self.spans[phase].append(span)
            if mine:
                self.open.pop()
                if self.open:
                    self.inside[self.open[-1]].append(span)

    @staticmethod
    def _mark() -> Any:
        import torch

        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        return {phase: total(spans) - total(self.inside[phase]) for phase, spans in self.spans.items()}


def total(spans: list[Span]) -> float:
    return sum(b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3 for a, b in spans)
