"""Time on a GPU by phase of quantization, for `bench/speed.py`."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

PHASES = {  # function of ours -> phase, without what the others inside of it take
    "hessian.gather": "forward to the stages", "hessian.add_to_hessian": "hessian", "hessian.add_drift": "drift",
    "gptq.factorize": "factor", "gptq.find_scales": "scale search",
    "gptq.solve": "column loop", "gptq.refine": "sweeps", "correction.Correction.moved": "correction",
    "gptq.row_errors": "losses", "pack.pack": "pack", "ranks.Several.pool": "sums of all ranks",
    "ranks.Several.gather": "rows of all ranks",
}  # fmt: skip
Span = tuple[Any, Any]


class Phases:
    """Device time spent in our functions, by events on the stream: nothing waits while it runs."""

    def __init__(self) -> None:
        self.spans: dict[str, list[Span]] = defaultdict(list)
        self.inside: dict[str, list[Span]] = defaultdict(list)  # spans of other phases in those of a phase
        self.open: list[str] = []

    def watch(self) -> None:
        import requant.correction
        import requant.gptq
        import requant.hessian
        import requant.pack
        import requant.quantize

        for path, phase in PHASES.items():
            *holders, name = path.split(".")
            holder: Any = requant
            for part in holders:
                holder = getattr(holder, part)
            original = getattr(holder, name)
            wrapped = self._wrapped(original, phase)
            setattr(holder, name, wrapped)
            if getattr(requant.quantize, name, None) is original:
                setattr(requant.quantize, name, wrapped)

    def _wrapped(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                self.open.append(phase)
                start = self._mark()
                try:
                    return function(*args, **kwargs)
                finally:
                    span = start, self._mark()
                    self.spans[self.open.pop()].append(span)
                    if self.open:
                        self.inside[self.open[-1]].append(span)
            if phase != "pack":
                return function(*args, **kwargs)  # a kernel that is only being compiled
            start = self._mark()
            try:
                return function(*args, **kwargs)
            finally:
                self.spans[phase].append((start, self._mark()))

        return timed

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
