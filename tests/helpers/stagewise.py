"""Two runs of `quantize` that sum in another order, compared stage by stage.

Such sums differ in their last bits, and one code on the edge between two levels changes all that follows it. So the
second run continues from each stage with the moments and solutions of the first: rounding never accumulates, and a
fault shows in its own stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.devices import set_profile
from requant.formats.registry import load_quantized
from requant.numerics.hessian import Moments
from requant.numerics.solution import Solution
from requant.quantize import block_quantizer
from requant.quantize.module_results import ModuleResult
from requant.quantize.plan import Settings
from requant.quantize.solve import Solved, solve_group
from requant.quantize.stage import quantize
from requant.runtime.ranks import SINGLE_PROCESS, Ranks


@dataclass
class Step:
    """One stage of a run alone: the moments of its input and the solution of each linear."""

    moments: Moments
    solutions: list[Solution]


@dataclass
class Compared:
    """One stage of another run beside its `Step`, on one rank.

    far: largest difference of the moments, as a share of `tolerance`. tokens: of both. alike: of each linear, the share
    of its rows that have the same codes and scales, out of the same moments. ratio: of each, the largest quotient of one
    row's losses in both runs, at least 1: among the rows alike, then among the others. same: whether damping, order and
    fallback are.
    """

    far: float
    tokens: tuple[int, int]
    alike: list[float]
    ratio: list[tuple[float, float]]
    same: bool


def copied(moments: Moments) -> Moments:
    drift, halves = moments.drift, moments.halves
    return Moments(
        moments.hessian.clone(), None if drift is None else drift.clone(),
        None if halves is None else (halves[0].clone(), halves[1].clone()), moments.tokens,
    )  # fmt: skip


def tolerance(tokens: int) -> float:
    """Bound on how far fp32 sums of products differ, as a share of both columns' norms.

    Each of two sums of t products is off by t units in the last place at most (Higham, Accuracy and Stability, 3.1); what
    is multiplied went through two blocks, 500 roundings for each of the two. A window of 64 that is missed is 1.6 %.
    """
    return (2 * tokens + 1000) * 2.0**-24


def far(got: Moments, wanted: Moments) -> float:
    pairs = [(got.hessian, wanted.hessian, wanted.hessian)]
    if wanted.drift is not None and got.drift is not None:
        pairs.append((got.drift, wanted.drift, wanted.hessian))
    if wanted.halves is not None and got.halves is not None:
        pairs += [(g, w, w) for g, w in zip(got.halves, wanted.halves, strict=True)]
    assert [got.drift is None, got.halves is None] == [wanted.drift is None, wanted.halves is None]
    worst = 0.0
    for one, other, of in pairs:
        norm = of.diagonal().double().sqrt()
        worst = max(worst, float(((one.double() - other.double()).abs() / norm[:, None] / norm).max()))
    return worst / tolerance(wanted.tokens)


def rows_alike(got: Solution, wanted: Solution) -> torch.Tensor:
    """Which rows have the same codes and scales, bool [rows]."""
    pairs = (got.codes, wanted.codes), (got.scales.scale, wanted.scales.scale), (got.scales.zero, wanted.scales.zero)
    return torch.stack([(a == b).all(dim=1) for a, b in pairs]).all(dim=0)


def loss_ratio(got: Solution, wanted: Solution, rows: torch.Tensor) -> float:
    """Largest ratio of the losses of `rows` in both solutions; 1 without rows.

    Losses: tr(E H E'), the same of rounding, and tr(W H W').
    """
    ratio = got.errors[:, rows].double() / wanted.errors[:, rows].double()
    return float(torch.maximum(ratio, 1 / ratio).nan_to_num(torch.inf).max()) if rows.any() else 1.0


def recorded(*args: Any, steps: dict[str, Step], like_a_gpu: bool = False, **options: Any) -> Any:
    """`quantize` alone; records input and result of each stage in `steps`.

    Keys: the name of the stage's first linear.
    """

    def solve(linears: Any, grids: Any, moments: Moments, *rest: Any, **more: Any) -> Iterator[Solved]:
        step = steps[next(iter(linears))] = Step(copied(moments), [])
        for solved in solve_group(linears, grids, moments, *rest, **more):
            step.solutions.append(solved.solution)
            yield solved

    with replaced(solve, like_a_gpu):
        return quantize(*args, **options)


def led(
    *args: Any, steps: Mapping[str, Step], like_a_gpu: bool = False, ranks: Ranks = SINGLE_PROCESS, **options: Any
) -> tuple[list[ModuleResult], list[Compared]]:
    """`quantize`, each stage continuing with the moments, then the solutions, of a run alone.

    Compares both.
    """
    compared: list[Compared] = []

    def solve(
        linears: Any, grids: Any, moments: Moments, settings: Settings, ranks: Ranks, **more: Any
    ) -> Iterator[Solved]:
        step = steps[next(iter(linears))]
        here = Compared(far(moments, step.moments), (moments.tokens, step.moments.tokens), [], [], True)
        own = solve_group(linears, grids, copied(step.moments), settings, ranks, **more)
        for solved, alone in zip(own, step.solutions, strict=True):
            got = solved.solution
            alike = rows_alike(got, alone)
            here.alike.append(float(alike.double().mean()))
            here.ratio.append((loss_ratio(got, alone, alike), loss_ratio(got, alone, ~alike)))
            here.same &= (got.damp, got.order, got.uncoupled) == (alone.damp, alone.order, alone.uncoupled)
            yield replace(solved, solution=alone)
        compared.extend(ranks.all_gather_objects(here))

    with replaced(solve, like_a_gpu):
        _, results = quantize(*args, ranks=ranks, **options)
    return results, compared


@contextmanager
def replaced(solve: Any, like_a_gpu: bool) -> Iterator[None]:
    """like_a_gpu: with the correction as a GPU has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_quantizer, "solve_group", solve)
        if like_a_gpu:
            set_profile(patch, corrects_by_drift=True, blocked_solve=True)
        yield


def assert_compared(stages: list[Compared], expected: int) -> None:
    """Assert that stages agree, but for a few rows that have a code near a rounding edge.

    Rows are solved by themselves, so such a code changes its own row only: of 64 rows and more 6 may, by bad luck.

    Sums of another order move what is rounded by about 1e-5 of a step, so about one row in 100 has a code that near
    to an edge. Such a row's codes answer to each other otherwise and lose about as much; those of another row lose many
    times as much.
    """
    assert len(stages) == expected
    for stage in stages:
        assert stage.tokens[0] == stage.tokens[1]
        assert stage.far < 1
        assert min(stage.alike) > 0.9
        assert max(alike for alike, _ in stage.ratio) < 1.001, "of the same codes the same sums"
        assert max(other for _, other in stage.ratio) < 2
        assert stage.same


def assert_same_files(one: Path, two: Path) -> None:
    assert sorted(f.name for f in one.iterdir()) == sorted(f.name for f in two.iterdir())
    assert (one / "config.json").read_text() == (two / "config.json").read_text()
    a, b = dict(load_quantized(one)), dict(load_quantized(two))
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
