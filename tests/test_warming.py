"""`requant.warming`: nothing on a CPU; what it would run on a GPU runs here too."""

from __future__ import annotations

import pytest
import torch

from requant import warming
from requant.grid import Grid
from requant.layout import Settings


def test_on_a_cpu_there_is_nothing_to_begin() -> None:
    begun = warming.Warming(torch.device("cpu"), {Grid(4, 32): 64}, Settings(grid=Grid(4, 32)), torch.float32)
    assert begun.running == []
    begun.wait()


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, -1, signed=True), Grid(4, 64, symmetric=False)])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_every_part_of_a_stage_is_called(grid: Grid, share: float) -> None:
    settings = Settings(grid=grid, sweeps=1, correct=share)
    for part in warming._parts(torch.device("cpu"), grid, 192, settings):
        part()
    warming._forward(torch.device("cpu"), torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_all_of_it_works() -> None:
    settings = Settings(grid=Grid(4, 32), sweeps=1, correct=0.5)
    begun = warming.Warming(torch.device("cuda"), {Grid(4, 32): 192}, settings, torch.bfloat16)
    begun.wait()
    assert len(begun.running) == 5
    for part in begun.running:
        part.result()
