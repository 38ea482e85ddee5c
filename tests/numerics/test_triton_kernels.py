"""`requant.numerics.triton_kernels` against the plain implementations.

In Triton's interpreter where there is no GPU.

The plain implementations are those that all other tests check. Sums of another order may break ties otherwise: one code in
a thousand.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.devices import set_profile
from helpers.gptq_problems import problem

from requant.numerics import gptq
from requant.numerics import grid as grid_module
from requant.numerics.grid import Grid

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.gpu(interpreted=True)
DEVICE = torch.device("cuda" if CUDA else "cpu")


GRIDS = [Grid(4, 64), Grid(4, 32, symmetric=False), Grid(3, -1, signed=True), Grid(8, 96), Grid(2, 64, symmetric=False)]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_search_finds_the_twins_scales(kernels: list[bool], grid: Grid) -> None:
    weight, hessian = (t.to(DEVICE) for t in problem(rows=21, columns=192))
    weight[3, :96] = 0
    fused = grid_module.find_scales(weight, hessian.diagonal(), grid)
    kernels[0] = False
    plain = grid_module.find_scales(weight, hessian.diagonal(), grid)
    same = (fused.scale == plain.scale) & (fused.zero == plain.zero)
    assert float(same.double().mean()) > 0.98

    def loss(scales: grid_module.Scales) -> float:
        rounded = grid_module.dequantize_codes(grid_module.round_to_grid(weight, scales, grid), scales)
        return float(((weight - rounded) ** 2 @ hessian.diagonal()).sum())

    assert loss(fused) == pytest.approx(loss(plain), rel=1e-4)


@pytest.mark.parametrize("outer", [128, 512])
@pytest.mark.parametrize("sweeps", [0, 1])
@pytest.mark.parametrize("grid", GRIDS[1:3])
def test_the_loops_choose_the_twins_codes(
    kernels: list[bool], grid: Grid, sweeps: int, outer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """192 columns: one whole block and a part, or a part only; 3 rows leave idle lanes.

    Blocks of 128 or of 256 columns.
    """
    set_profile(monkeypatch, DEVICE.type, gptq_outer=outer)
    set_profile(monkeypatch, DEVICE.type, gptq_block=outer // 2 if outer > 128 else 128)
    weight, hessian = (t.to(DEVICE) for t in problem(rows=3, columns=192))
    order = gptq.column_order(hessian.diagonal(), "activation", grid.group_size)
    factor = gptq.factorize(hessian, order, 0.02)
    kernels[0] = False
    plain = gptq.quantize_weight(weight, hessian, factor, grid, sweeps=sweeps)
    scales = plain.scales
    kernels[0] = True
    codes, error = gptq.solve(weight, factor, scales, grid)
    gptq.refine(codes, error, hessian, 0.02 * float(hessian.diagonal().mean()), scales, grid, sweeps)
    assert float((plain.codes != codes.T).double().mean()) < 0.01
    assert torch.allclose(error.T, weight - grid_module.dequantize_codes(codes.T, scales), atol=1e-5)
    assert float(gptq.row_errors(error, hessian).sum()) == pytest.approx(plain.loss, rel=2e-2)


def test_blocks_parts_and_programs_that_are_not_full(kernels: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial programs, blocks and parts of a wider matrix.

    37 rows are three programs; 40 columns are two and a half parts; 104 are two blocks and a part.
    """
    weight, hessian = (t.to(DEVICE) for t in problem(rows=37, columns=200))
    grid = Grid(4, 8)
    factor = gptq.factorize(hessian, gptq.column_order(hessian.diagonal(), "activation", 8), 0.02)
    kernels[0] = False
    plain = gptq.quantize_weight(weight, hessian, factor, grid, sweeps=1)
    kernels[0] = True
    set_profile(monkeypatch, DEVICE.type, gptq_outer=104)
    set_profile(monkeypatch, DEVICE.type, gptq_block=40)
    codes, error = gptq.solve(weight, factor, plain.scales, grid)
    gptq.refine(codes, error, hessian, 0.02 * float(hessian.diagonal().mean()), plain.scales, grid, 1)
    assert float((plain.codes != codes.T).double().mean()) < 0.01
    assert torch.allclose(error.T, weight - grid_module.dequantize_codes(codes.T, plain.scales), atol=1e-5)


def test_a_fused_solution_is_whole(kernels: list[bool]) -> None:
    weight, hessian = (t.to(DEVICE) for t in problem(rows=6, columns=128))
    grid = replace(GRIDS[0], group_size=32)
    factor = gptq.factorize(hessian, gptq.column_order(hessian.diagonal(), "activation", 32), 0.01)
    fused = gptq.quantize_weight(weight, hessian, factor, grid, sweeps=1)
    kernels[0] = False
    plain = gptq.quantize_weight(weight, hessian, factor, grid, sweeps=1)
    assert (fused.loss, fused.losses().rtn_relative) == pytest.approx(
        (plain.loss, plain.losses().rtn_relative), rel=1e-2
    )
