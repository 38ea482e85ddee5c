"""`requant.numerics.gptq` against classic GPTQ in fp64; identities of its parts."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import oracle
from helpers.devices import set_profile
from helpers.gptq_problems import COLUMNS, ROWS, problem, solved
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from requant.numerics import gptq
from requant.numerics import grid as grid_module
from requant.numerics.grid import Grid, Scales
from requant.numerics.hessian import add_to_hessian, symmetrize
from requant.numerics.solution import Order

NEAREST = 0.5 + 1e-3  # of a step; sums in fp32 move what is rounded by about 1e-5, anything wrong by tenths


def looped(weight: Tensor, factor: gptq.Factor, scales: Scales, grid: Grid) -> Tensor:
    """Codes of the column loop, [rows, n]; its error is what the codes say."""
    codes, error = gptq.solve(weight, factor, scales, grid)
    assert torch.allclose(error.T, weight - grid_module.dequantize_codes(codes.T, scales), atol=1e-6)
    return codes.T


def classic(codes: Tensor, weight: Tensor, hessian: Tensor, scales: Scales, grid: Grid, order: Tensor) -> float:
    return oracle.from_classic_gptq(codes, weight, hessian, scales.scale, scales.zero, grid.bits, order, 0.01)


def refined(weight: Tensor, codes: Tensor, hessian: Tensor, scales: Scales, grid: Grid, sweeps: int) -> Tensor:
    """Codes [rows, n] after coordinate descent from `codes`; its error is what the codes say."""
    result, error = codes.T.clone(), (weight - grid_module.dequantize_codes(codes, scales)).T.contiguous()
    gptq.refine(result, error, hessian, 0.0, scales, grid, sweeps)
    assert torch.allclose(error.T, weight - grid_module.dequantize_codes(result.T, scales), atol=1e-5)
    return result.T


@pytest.mark.slow
@pytest.mark.parametrize("order", ["natural", "activation", "group"])
@pytest.mark.parametrize("grid", [Grid(4, 64), Grid(4, 32, symmetric=False), Grid(3, 64, signed=True), Grid(8, -1)])
def test_solve_is_classic_gptq(order: Order, grid: Grid) -> None:
    """One Cholesky of the flipped Hessian rounds what the usual inverse route rounds."""
    weight, hessian = problem()
    columns = gptq.column_order(hessian.diagonal(), order, grid.group_size)
    factor = gptq.factorize(hessian, columns, 0.01)
    scales = grid_module.find_scales(weight, hessian.diagonal(), grid)
    codes = looped(weight, factor, scales, grid)
    assert classic(codes, weight, hessian, scales, grid, columns) <= NEAREST


def test_the_factor_reproduces_the_hessian() -> None:
    """L L' is the damped Hessian in reverse order of rounding, L lower triangular."""
    _, hessian = problem()
    order = gptq.column_order(hessian.diagonal(), "activation", 64)
    factor = gptq.factorize(hessian, order, 0.05)
    lower = factor.lower.double()
    damped = hessian.double() + 0.05 * hessian.double().diagonal().mean() * torch.eye(COLUMNS)
    assert torch.equal(factor.order, order.flip(0))
    assert torch.equal(factor.lower, factor.lower.tril())
    assert torch.allclose(lower @ lower.T, damped[factor.order][:, factor.order], rtol=1e-4, atol=1e-4)
    assert (factor.damp, factor.diagonal) == (0.05, False)


@pytest.mark.parametrize("order", ["natural", "activation", "group"])
@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(2, 64, symmetric=False), Grid(3, -1), Grid(8, 128)])
def test_identity_hessian_is_round_to_nearest(order: Order, grid: Grid) -> None:
    """With uncorrelated inputs there is nothing to compensate: exactly the same codes."""
    weight, _ = problem()
    hessian = torch.eye(COLUMNS) * 3.0
    factor = gptq.factorize(hessian, gptq.column_order(hessian.diagonal(), order, grid.group_size), 0.01)
    scales = grid_module.find_scales(weight, hessian.diagonal(), grid)
    assert torch.equal(looped(weight, factor, scales, grid), grid_module.round_to_grid(weight, scales, grid))


@pytest.mark.parametrize(("block", "outer"), [(1, 1), (7, 30), (7, 256), (64, 128), (64, 200), (200, 200), (256, 1000)])
def test_block_size_does_not_change_the_codes(block: int, outer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lazy block update is a bracketing of the same sums."""
    weight, hessian = problem()
    grid = Grid(4, 64)
    columns = gptq.column_order(hessian.diagonal(), "activation", 64)
    factor = gptq.factorize(hessian, columns, 0.01)
    scales = grid_module.find_scales(weight, hessian.diagonal(), grid)
    set_profile(monkeypatch, gptq_block=block)
    set_profile(monkeypatch, gptq_outer=outer)
    assert classic(looped(weight, factor, scales, grid), weight, hessian, scales, grid, columns) <= NEAREST


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "grid", [Grid(4, 64), Grid(3, 32), Grid(4, 128, search="minmax"), Grid(4, 64, symmetric=False)]
)
def test_loss_is_below_round_to_nearest_with_the_same_scales(seed: int, grid: Grid) -> None:
    weight, hessian = problem(seed=seed)
    scales = grid_module.find_scales(weight, hessian.diagonal(), grid)
    rounded = grid_module.dequantize_codes(grid_module.round_to_grid(weight, scales, grid), scales)
    for order in ("natural", "activation", "group"):
        factor = gptq.factorize(hessian, gptq.column_order(hessian.diagonal(), order, grid.group_size), 0.01)
        result = grid_module.dequantize_codes(looped(weight, factor, scales, grid), scales)
        assert gptq.output_error(weight - result, hessian) <= gptq.output_error(weight - rounded, hessian)


def test_output_error_is_the_sum_of_residuals_over_the_factor() -> None:
    """tr(E H E') = sum_j D_jj |E U_j|^2 without damping; E U_j is the column's residual."""
    weight, hessian = problem(rows=8, columns=64)
    grid = Grid(4, 32)
    factor = gptq.factorize(hessian, gptq.column_order(hessian.diagonal(), "activation", 32), 0.0)
    solution = solved(weight, hessian, grid, "activation", damp=0.0)
    error = (weight - solution.weight()).double()
    residual = error[:, factor.order] @ factor.lower.double()
    assert solution.loss == pytest.approx(float((residual**2).sum()), rel=1e-3)
    assert solution.loss == pytest.approx(oracle.hessian_loss(error, hessian), rel=1e-4)
    relative = (solution.loss / oracle.hessian_loss(weight, hessian)) ** 0.5
    assert solution.losses().relative == pytest.approx(relative, rel=1e-3)


@pytest.mark.parametrize("width", [64, 700])
def test_hessian_does_not_depend_on_the_batch_split(width: int) -> None:
    """Any split sums the same outer products; 700 columns make several panels."""
    x = torch.randn(6, 20, width)
    exact = (x.double().reshape(-1, width).T @ x.double().reshape(-1, width)).float()
    for parts in ([6], [1] * 6, [2, 3, 1]):
        hessian = torch.zeros(width, width)
        for part in x.split(parts):
            add_to_hessian(hessian, part)
        symmetrize(hessian)
        assert torch.equal(hessian, hessian.T)
        assert torch.allclose(hessian, exact, rtol=1e-4, atol=1e-4)
    half = torch.zeros(width, width)
    add_to_hessian(half, x.bfloat16())
    assert half.dtype == torch.float32


@given(st.floats(1e-12, 6e4), st.booleans())
def test_deployable_scales_are_exact_in_both_16_bit_types(value: float, negative: bool) -> None:
    scale = torch.tensor([-value if negative else value])
    out = grid_module.deployable(scale)
    assert torch.equal(out.half().float(), out)
    assert torch.equal(out.bfloat16().float(), out)
    assert bool((out != 0).all())
    assert bool((torch.signbit(out) == torch.signbit(scale)).all())
    # 8 bits of mantissa where fp16 is normal; its subnormal spacing of 2^-24 below.
    assert abs(float(out) - float(scale)) <= max(abs(float(scale)) * 2**-8, 2**-24)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), itertools.product([2, 3, 4, 8], [32, 128, -1]))
def test_weighted_search_is_no_worse_than_minmax(bits: int, group: int, symmetric: bool) -> None:
    """Measured by what it minimises.

    Its list of ranges contains nearly the full one: 1 % slack for the gap.
    """
    weight, hessian = problem()
    importance = hessian.diagonal()
    errors = {}
    for name, grid in {
        "minmax": Grid(bits, group, symmetric=symmetric, search="minmax"),
        "hessian": Grid(bits, group, symmetric=symmetric),
        "signed": Grid(bits, group, symmetric=symmetric, signed=True),
    }.items():
        scales = grid_module.find_scales(weight, importance, grid)
        rounded = grid_module.dequantize_codes(grid_module.round_to_grid(weight, scales, grid), scales)
        errors[name] = float(((weight - rounded) ** 2 @ importance).sum())
        assert bool(torch.isfinite(scales.scale).all())
        assert bool((scales.scale > 0).all()) or name == "signed"
    assert errors["hessian"] <= errors["minmax"] * 1.01
    assert errors["signed"] <= errors["hessian"] * 1.01


def test_a_scale_does_not_depend_on_how_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem()
    whole = grid_module.find_scales(weight, hessian.diagonal(), Grid(4, 64))
    set_profile(monkeypatch, search_elements=3 * COLUMNS)
    cut = grid_module.find_scales(weight, hessian.diagonal(), Grid(4, 64))
    # Sums of another shape round differently: two candidates that tie in fp32 may swap.
    assert float((whole.scale != cut.scale).double().mean()) < 0.02


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scales_are_found_by_brute_force_too(bits: int) -> None:
    """The coarse-to-fine list is within 3 % of a search ten times as dense.

    With few bits the best share is above 1: the short side has to reach the largest weight.
    """
    weight, hessian = problem(rows=16, columns=64)
    importance = hessian.diagonal()
    grid = Grid(bits, 32)
    half = 2 ** (bits - 1)
    scales = grid_module.find_scales(weight, importance, grid)
    rounded = grid_module.dequantize_codes(grid_module.round_to_grid(weight, scales, grid), scales)
    ours = ((weight - rounded) ** 2 * importance).reshape(16, 2, 32).sum(2).double()
    best = torch.full((16, 2), float("inf"), dtype=torch.float64)
    groups, h = weight.double().reshape(16, 2, 32), importance.double().reshape(2, 32)
    for shrink in torch.linspace(0.4, half / (half - 1), 1200).double():
        s = (groups.abs().amax(2) * shrink / half)[..., None]
        error = groups - s * torch.clamp(torch.round(groups / s), -half, half - 1)
        best = torch.minimum(best, (error**2 * h).sum(2))
    assert float(ours.sum()) <= float(best.sum()) * 1.03
    # A group can be a little better by the luck of a scale between two candidates, never by much in total.
    assert float(ours.sum()) >= float(best.sum()) * 0.97


def test_asymmetric_zeros_can_be_stored() -> None:
    """Whole numbers from 1 on: format v1 stores them minus one."""
    weight, hessian = problem()
    weight[0], weight[1] = weight[0].abs() + 0.2, -weight[1].abs() - 0.2
    for bits, search in itertools.product((2, 4, 8), ("hessian", "minmax")):
        scales = grid_module.find_scales(weight, hessian.diagonal(), Grid(bits, 64, symmetric=False, search=search))
        assert torch.equal(scales.zero, scales.zero.round())
        assert (float(scales.zero.min()), float(scales.zero.max())) >= (1.0, 1.0)
        assert float(scales.zero.max()) <= 2**bits - 1


def test_asymmetric_grid_serves_one_sided_weights_better() -> None:
    weight, hessian = problem()
    weight = weight.abs()
    symmetric, asymmetric = (
        solved(weight, hessian, Grid(4, 64, symmetric=s), "activation").losses().relative for s in (True, False)
    )
    assert asymmetric < symmetric


@pytest.mark.parametrize(("bits", "group"), itertools.product([2, 3, 4, 8], [32, 64, 128, -1]))
def test_every_width_and_group(bits: int, group: int) -> None:
    """Codes fit their width, more bits lose less, and the weight is what the codes say."""
    weight, hessian = problem()
    solution = solved(weight, hessian, Grid(bits, group), "activation")
    assert (solution.codes.dtype, solution.codes.shape) == (torch.uint8, weight.shape)
    assert int(solution.codes.max()) < 2**bits
    assert solution.scales.scale.shape == (ROWS, Grid(bits, group).groups(COLUMNS))
    exact = oracle.codes_to_weight(solution.codes, solution.scales.scale, solution.scales.zero)
    assert torch.allclose(solution.weight().double(), exact, rtol=1e-6, atol=0)
    # Uniform rounding of a normal weight: about max|w| / 2^(b-1) / sqrt(12), with max|w| under 4 sigma of the weight.
    assert solution.losses().relative < 4 / 2 ** (bits - 1) / 12**0.5
    assert solution.losses().relative < solution.losses().rtn_relative
    assert not solution.losses().fallback


def test_rows_do_not_influence_each_other() -> None:
    """A row among others gets the codes of classic GPTQ alone: fused q, k, v rely on it."""
    weight, hessian = problem()
    grid, columns = Grid(4, 64), gptq.column_order(hessian.diagonal(), "activation", 64)
    together, alone = (solved(w, hessian, grid, "activation") for w in (weight, weight[5:9]))
    for own in together.codes[5:9], alone.codes:
        assert classic(own, weight[5:9], hessian, alone.scales, grid, columns) <= NEAREST
    assert torch.equal(together.scales.scale[5:9], alone.scales.scale)


def test_column_orders() -> None:
    diagonal = torch.tensor([1.0, 5.0, 3.0, 3.0, 9.0, 0.5])
    assert gptq.column_order(diagonal, "natural", 2).tolist() == [0, 1, 2, 3, 4, 5]
    assert gptq.column_order(diagonal, "activation", 2).tolist() == [4, 1, 2, 3, 0, 5]
    assert gptq.column_order(diagonal, "group", 2).tolist() == [4, 5, 1, 0, 2, 3]
    assert gptq.column_order(diagonal, "group", -1).tolist() == [4, 1, 2, 3, 0, 5]


def test_singular_hessian_doubles_the_damping_and_says_so() -> None:
    """An indefinite matrix fails at damping 0.01; more than its negative eigenvalue succeeds."""
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 1.1  # eigenvalue -0.1
    factor = gptq.factorize(hessian, torch.arange(64), 0.01)
    assert factor.damp == pytest.approx(0.16)
    assert not factor.diagonal
    hessian[0, 1] = hessian[1, 0] = 3.0  # beyond every damping
    solution = solved(torch.randn(4, 64), hessian, Grid(4, 32), "natural")
    assert solution.losses().fallback
    assert solution.damp == pytest.approx(gptq.MAX_DAMP), "the last that was tried"


def test_fallback_is_round_to_nearest() -> None:
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 3.0
    weight = torch.randn(4, 64)
    solution = solved(weight, hessian, Grid(4, 32), "natural")
    assert torch.equal(solution.codes, grid_module.round_to_grid(weight, solution.scales, solution.grid))


@pytest.mark.parametrize("order", ["natural", "activation", "group"])
def test_dead_columns_keep_their_weights(order: Order) -> None:
    """Inputs never seen in calibration are rounded, not zeroed; another text may use them."""
    weight, hessian = problem()
    dead = torch.zeros(COLUMNS, dtype=torch.bool)
    dead[[3, 70, 71, 200]] = True
    dead[128:192] = True  # a whole group
    hessian[dead] = 0
    hessian[:, dead] = 0
    solution = solved(weight, hessian, Grid(4, 64), order)
    error = (solution.weight() - weight)[:, dead]
    assert float(error.norm() / weight[:, dead].norm()) < 0.2
    assert float((solution.weight()[:, 128:192] - weight[:, 128:192]).norm() / weight[:, 128:192].norm()) < 0.12


def test_a_hessian_of_zeros_rounds_to_nearest() -> None:
    weight, _ = problem(rows=8, columns=64)
    solution = solved(weight, torch.zeros(64, 64), Grid(4, 32), "activation")
    assert solution.losses().fallback
    assert float((solution.weight() - weight).norm() / weight.norm()) < 0.12


def test_a_factor_knows_the_mean_of_its_hessians_diagonal() -> None:
    _, hessian = problem(rows=2, columns=64)
    assert gptq.factorize(hessian, torch.arange(64), 0.01).mean == pytest.approx(float(hessian.diagonal().mean()))
    none = gptq.factorize(-hessian, torch.arange(64), 0.01)
    assert none.diagonal
    assert none.mean == pytest.approx(-float(hessian.diagonal().mean()))


def test_one_rounded_row_is_no_fallback() -> None:
    weight, hessian = problem(rows=8, columns=64)
    solution = solved(weight, hessian, Grid(4, 32), "activation")
    few = replace(solution, rounded=torch.arange(8) < 4)
    most = replace(solution, rounded=torch.arange(8) < 5)
    assert (few.losses().rounded, few.losses().fallback) == (0.5, False)
    assert most.losses().fallback


def test_a_hessian_with_nan_is_refused() -> None:
    hessian = torch.eye(64)
    hessian[3, 3] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        gptq.factorize(hessian, torch.arange(64), 0.01)


def test_zero_weights_stay_zero() -> None:
    _, hessian = problem(columns=64)
    for grid in (Grid(4, 32), Grid(4, 32, search="minmax"), Grid(4, 32, symmetric=False)):
        solution = solved(torch.zeros(4, 64), hessian, grid, "activation")
        assert torch.equal(solution.weight(), torch.zeros(4, 64))


def test_stacked_weights_split_into_what_each_gives_alone() -> None:
    weight, hessian = problem()
    sizes = [16, 8, 24]
    parts = solved(weight, hessian, Grid(4, 64), "activation", sweeps=2).split(sizes)
    for part, rows in zip(parts, weight.split(sizes), strict=True):
        own = solved(rows, hessian, Grid(4, 64), "activation", sweeps=2)
        differing = (part.codes != own.codes).any(dim=1)
        assert int(differing.sum()) <= 1, (
            "a code on the edge of two levels changes its own row, one in hundreds of rows"
        )
        assert torch.equal(part.scales.scale, own.scales.scale)
        assert torch.allclose(part.errors[:, ~differing], own.errors[:, ~differing], rtol=1e-3)
        assert torch.allclose(part.errors, own.errors, rtol=0.5)


def test_rows_that_rounding_serves_better_are_rounded() -> None:
    """A weight on its grid already loses nothing when rounded; feedback cannot improve on that."""
    _, hessian = problem()
    grid = Grid(4, 64)
    codes = torch.randint(0, 16, (ROWS, COLUMNS), dtype=torch.uint8)
    codes[:, ::64] = 0  # the widest code in every group, so that min-max finds the scale
    weight = grid_module.dequantize_codes(codes, Scales(torch.full((ROWS, 4), 0.25), torch.full((ROWS, 4), 8.0)))
    solution = solved(weight, hessian, grid, "activation")
    rounding = grid_module.round_to_grid(weight, solution.scales, grid)
    exact = weight - grid_module.dequantize_codes(rounding, solution.scales)
    assert solution.loss <= gptq.output_error(exact, hessian) * (1 + 1e-4) + 1e-9


def test_solution_is_deterministic() -> None:
    weight, hessian = problem()
    first, second = (solved(weight.clone(), hessian.clone(), Grid(4, 64), "activation") for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert first.loss == second.loss


@pytest.mark.parametrize("symmetric", [True, False])
def test_refining_is_coordinate_descent(symmetric: bool) -> None:
    """Against trying every level of every code in fp64, where no two levels come close to a tie."""
    torch.manual_seed(0)
    x = torch.randn(200, 32) @ torch.randn(32, 32)
    hessian, weight, grid = x.T @ x / 200, torch.randn(4, 32), Grid(3, 32, symmetric=symmetric)
    hessian.diagonal().add_(0.01)
    scales = grid_module.find_scales(weight, hessian.diagonal(), grid)
    start = grid_module.round_to_grid(weight, scales, grid)
    wide = [t.repeat_interleave(32, dim=1) for t in (scales.scale.double(), scales.zero.double())]
    expected, closest = oracle.coordinate_descent(weight, start, hessian, *wide, grid.levels, sweeps=2)
    assert closest > 1e-4, "of fp32's 1e-6 or so nothing hangs"
    assert torch.equal(refined(weight, start, hessian, scales, grid, 2), expected)


def test_refining_never_loses_and_block_size_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem()
    grid = Grid(4, 64)
    scales = grid_module.find_scales(weight, hessian.diagonal(), grid)
    codes = [grid_module.round_to_grid(weight, scales, grid)]
    for _ in range(4):
        codes.append(refined(weight, codes[-1], hessian, scales, grid, 1))
    losses = [gptq.output_error(weight - grid_module.dequantize_codes(c, scales), hessian) for c in codes]
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(refined(weight, codes[0], hessian, scales, grid, 0), codes[0])

    def descended(after: Tensor) -> float:
        return oracle.from_descent(after, codes[0], weight, hessian, scales.scale, scales.zero, grid.levels)

    assert descended(codes[1]) <= NEAREST
    set_profile(monkeypatch, gptq_block=48)
    for outer in (48, 128, 1000):
        set_profile(monkeypatch, gptq_outer=outer)
        other = refined(weight, codes[0], hessian, scales, grid, 1)
        assert descended(other) <= NEAREST
