"""Warm-up: load CUDA libraries and compile Triton kernels in threads while other work runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from requant.modeling import skeleton
from requant.modeling.blocks import block_list
from requant.modeling.fused_ops import FusedOps
from requant.numerics import cholesky, gptq, grid, triton_kernels
from requant.numerics.grid import Grid
from requant.quantize.plan import Plan, Settings
from requant.runtime.device import PROFILES
from requant.runtime.interpreter import gpu_interpreter_settings
from requant.runtime.ranks import SINGLE_PROCESS, Ranks

log = logging.getLogger(__name__)
ROWS = 64
COLUMNS = PROFILES[
    "cuda"
].gptq_outer  # and what is left over of a linear's own width: every kernel that its columns need


class WarmUp:
    """Runs small problems of each kind in threads; on exit, those not started are cancelled.

    Errors are only logged here: a library or kernel that fails raises where it is first needed.
    """

    def __init__(
        self,
        device: torch.device,
        widths: Mapping[Grid, int],
        settings: Settings,
        dtype: torch.dtype,
        *,
        also: Sequence[Callable[[], object]] = (),
        later: Callable[[], object] | None = None,
    ) -> None:
        """Prepare the parts; on a CPU there are none.

        widths: inputs of a linear of each grid. also: more parts. later: runs in a thread after all parts are done.
        """
        on_gpu = device.type == "cuda"
        self.device, self.later = device, later if on_gpu else None
        self.parts = [*_parts(device, widths, settings, dtype), *also] if on_gpu else []
        self.pool = ThreadPoolExecutor(max(1, len(self.parts)))
        self.running: list[Future[None]] = []
        self.after: Future[None] | None = None

    def __enter__(self) -> WarmUp:
        self.running = [self.pool.submit(_apart, self.device, part) for part in self.parts]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.running.clear()
        self.pool.shutdown(wait=False, cancel_futures=True)

    def wait(self) -> None:
        """Wait for all parts, so that nothing is compiled twice, and start `later`."""
        while self.running:
            if (error := self.running.pop().exception()) is not None:
                log.debug("first use of a kernel failed: %s", error)
        if self.later is not None:
            self.after, self.later = self.pool.submit(_apart, self.device, self.later), None

    def wait_all(self) -> None:
        """Wait for all parts and for `later`."""
        self.wait()
        if self.after is not None and (error := self.after.exception()) is not None:
            log.debug("compiling the fused operations failed: %s", error)


@contextmanager
def warm_up(
    base: Path,
    layout: Plan,
    settings: Settings,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trust_remote_code: bool = False,
) -> Iterator[None]:
    """Context that warms up for `quantize` in threads. base: the directory of config.json."""
    if device.type != "cuda":
        yield
        return
    model = skeleton.open_model(base, trust_remote_code=trust_remote_code, split=True)
    passes = FusedOps(block_list(model)[1], device, dtype)
    with (
        gpu_interpreter_settings(device),
        WarmUp(device, narrowest(model, layout), settings, dtype, also=[passes.try_out]),
    ):
        yield


def connect(device: torch.device, *, ranks: Ranks = SINGLE_PROCESS) -> None:
    """Connect the GPUs of all ranks while other work runs; every rank makes this call."""
    ranks.connect(ranks.device_of(device))


def narrowest(model: nn.Module, layout: Plan) -> dict[Grid, int]:
    """The fewest inputs that a linear of each grid has."""
    widths: dict[Grid, int] = {}
    for name, quantized in layout.grids.items():
        n: Any = model.get_submodule(name).in_features
        widths[quantized] = min(n, widths.get(quantized, n))
    return widths


def _apart(device: torch.device, work: Callable[[], object]) -> None:
    """Run `work` in a thread: gradient mode and current device are set for each thread."""
    with torch.no_grad(), torch.cuda.device(device):
        work()


def _parts(
    device: torch.device, widths: Mapping[Grid, int], settings: Settings, dtype: torch.dtype
) -> list[Callable[[], object]]:
    """The parts of a forward and a solve that compile in parallel.

    No part holds memory before it runs. Only one part factors: torch's linear algebra libraries must not be loaded by
    two threads at once.
    """
    parts: list[Callable[[], object]] = [
        partial(triton_kernels.begin, device),
        partial(_forward, device, dtype),
        partial(_factor, device, settings),
    ]
    for quantized, width in widths.items():
        n = width
        if quantized.group_size > 0 and COLUMNS % quantized.group_size == 0 and width > COLUMNS:
            n = COLUMNS + width % COLUMNS
        parts += [partial(part, device, quantized, n) for part in (_search, _solve)]
        if settings.sweeps:
            parts.append(partial(_refine, device, quantized, n))
    return parts


def _forward(device: torch.device, dtype: torch.dtype) -> None:
    x = torch.ones(1, 8, 64, 64, dtype=dtype, device=device)
    torch.nn.functional.scaled_dot_product_attention(x @ x, x, x, is_causal=True)


def _factor(device: torch.device, settings: Settings) -> None:
    found = gptq.factorize(torch.eye(COLUMNS, device=device), torch.arange(COLUMNS, device=device), 0.01)
    if settings.correct:
        cholesky.substitute(found.lower, torch.ones(COLUMNS, ROWS, device=device))


def _search(device: torch.device, quantized: Grid, n: int) -> None:
    grid.find_scales(torch.ones(ROWS, n, device=device), torch.ones(n, device=device), quantized)


def _solve(device: torch.device, quantized: Grid, n: int) -> None:
    factor = gptq.Factor(lower=torch.eye(n, device=device), order=torch.arange(n, device=device), damp=0.01, mean=1.0)
    gptq.solve(torch.ones(ROWS, n, device=device), factor, _scales(device, quantized, n), quantized)


def _refine(device: torch.device, quantized: Grid, n: int) -> None:
    codes = torch.zeros(n, ROWS, dtype=torch.uint8, device=device)
    error = torch.zeros(n, ROWS, device=device)
    gptq.refine(codes, error, torch.eye(n, device=device), 0.01, _scales(device, quantized, n), quantized, 1)


def _scales(device: torch.device, quantized: Grid, n: int) -> grid.Scales:
    scale = torch.ones(ROWS, quantized.groups(n), device=device)
    return grid.Scales(scale, torch.full_like(scale, quantized.levels // 2))
