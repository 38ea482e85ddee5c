"""Time on a GPU by phase of quantization, for `bench/speed.py`."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

PHASES = {  # function of ours -> phase
    ("hessian", "gather"): "forward + hessian", ("hessian", "add_to_hessian"): "hessian", ("hessian", "add_drift"): "drift",
    ("gptq", "factorize"): "factor", ("gptq", "find_scales"): "scale search", ("gptq", "solve"): "column loop",
    ("gptq", "refine"): "sweeps", ("correction", "moved"): "correction", ("gptq", "row_errors"): "losses",
    ("pack", "pack"): "pack",
    ("ranks", "pool"): "sums of all ranks", ("ranks", "gather"): "rows of all ranks",
}  # fmt: skip
CLASSES = {"ranks": "Several", "correction": "Correction"}  # whose methods these are


class Phases:
    """Device time spent in our functions, by events on the stream: nothing waits while it runs."""

    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def watch(self) -> None:
        import requant.correction
        import requant.gptq
        import requant.hessian
        import requant.pack
        import requant.quantize

        for (module, name), phase in PHASES.items():
            holder: Any = getattr(requant, module)
            holder = getattr(holder, CLASSES[module]) if module in CLASSES else holder
            original = getattr(holder, name)
            wrapped = self._wrapped(original, phase)
            setattr(holder, name, wrapped)
            if getattr(requant.quantize, name, None) is original:
                setattr(requant.quantize, name, wrapped)

    def _wrapped(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread() and phase != "pack":
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
        out = {}
        for phase, spans in self.spans.items():
            out[phase] = sum(b - a if isinstance(a, float) else a.elapsed_time(b) / 1e3 for a, b in spans)
        if "forward + hessian" in out:
            out["forward to the stages"] = out.pop("forward + hessian") - sum(
                out.get(part, 0) for part in ("hessian", "drift", "sums of all ranks")
            )
        return out
