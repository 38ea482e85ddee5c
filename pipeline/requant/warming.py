"""A GPU's first use of its libraries and of our kernels, beside what else a start takes: seconds, most of them compiling."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from requant import gptq, grid
from requant.correction import Correction
from requant.grid import Grid
from requant.layout import Settings

ROWS = 64


class Warming:
    """Small problems of the kinds that will come, solved by threads. What fails here fails again where it is needed."""

    def __init__(
        self, device: torch.device, widths: Mapping[Grid, int], settings: Settings, dtype: torch.dtype
    ) -> None:
        """Begins at once; on a CPU there is nothing to begin. widths: inputs of a linear of each grid that will come."""
        self.running: list[Future[None]] = []
        if device.type != "cuda":
            return
        pool = ThreadPoolExecutor(4)
        self.running.append(pool.submit(_apart, device, lambda: _forward(device, dtype)))
        for wanted, columns in widths.items():
            for part in _parts(device, wanted, columns, settings):
                self.running.append(pool.submit(_apart, device, part))
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Until all is done, so that nothing is compiled twice."""
        wait(self.running)


def _apart(device: torch.device, work: Callable[[], object]) -> None:
    """In a thread, which has settings of its own."""
    with torch.no_grad(), torch.cuda.device(device):
        work()


def _forward(device: torch.device, dtype: torch.dtype) -> None:
    """What every forward calls."""
    x = torch.ones(1, 8, 64, 64, dtype=dtype, device=device)
    torch.nn.functional.scaled_dot_product_attention(x @ x, x, x, is_causal=True)


def _parts(device: torch.device, wanted: Grid, n: int, settings: Settings) -> list[Callable[[], object]]:
    """What a stage calls, each part by itself: one compiles while another does."""
    hessian, weight = torch.eye(n, device=device), torch.ones(ROWS, n, device=device)
    order = torch.arange(n, device=device)
    scale = torch.ones(ROWS, wanted.groups(n), device=device)
    scales = grid.Scales(scale, torch.full_like(scale, wanted.levels // 2))
    factor = gptq.Factor(hessian, order, 0.01)

    def refine() -> None:
        codes = torch.zeros(n, ROWS, dtype=torch.uint8, device=device)
        gptq.refine(codes, torch.zeros(n, ROWS, device=device), hessian, 0.01, scales, wanted, settings.sweeps)

    def factorize() -> None:
        found = gptq.factorize(hessian, order, 0.01)
        Correction(hessian if settings.correct else None, [weight]).moved(0, weight, found, settings.correct)

    return [
        lambda: grid.find_scales(weight, hessian.diagonal(), wanted),
        lambda: gptq.solve(weight, factor, scales, wanted),
        refine,
        factorize,
    ]
