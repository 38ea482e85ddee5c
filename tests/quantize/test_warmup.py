"""`requant.quantize.warmup`: nothing on a CPU; what it would run on a GPU runs here too."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.e2e import recipe

from requant.checkpoint.run_directory import RunDirectory
from requant.numerics import cholesky, gptq, triton_kernels
from requant.numerics import grid as grid_module
from requant.numerics.grid import Grid
from requant.quantize import warmup
from requant.quantize.plan import Settings
from requant.run import prepare
from requant.run.context import RunContext
from requant.run.observer import Watcher
from requant.run.quantize_stage import compile_ahead
from requant.runtime import interpreter

CPU = torch.device("cpu")


def test_on_a_cpu_there_is_nothing_to_do() -> None:
    with warmup.WarmUp(CPU, {Grid(4, 32): 64}, Settings(grid=Grid(4, 32)), torch.float32) as begun:
        assert begun.running == []
        begun.wait()


@pytest.mark.parametrize("sweeps", [0, 1])
def test_every_kernel_of_every_grid_is_called(sweeps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, Grid | None]] = []

    def watch(holder: Any, name: str) -> None:
        original = getattr(holder, name)

        def counted(*args: Any) -> Any:
            called.append((name, next((a for a in args if isinstance(a, Grid)), None)))
            return original(*args)

        monkeypatch.setattr(holder, name, counted)

    watch(triton_kernels, "begin")
    watch(grid_module, "find_scales")
    watch(gptq, "solve")
    watch(gptq, "refine")
    watch(gptq, "factorize")
    watch(cholesky, "substitute")
    grids = [Grid(4, 32), Grid(3, -1, signed=True), Grid(4, 96, symmetric=False)]
    settings = Settings(grid=grids[0], sweeps=sweeps, correct=0.5)
    for part in warmup._parts(CPU, dict.fromkeys(grids, 576), settings, torch.float32):
        part()
    wanted: list[tuple[str, Grid | None]] = [("begin", None), ("factorize", None), ("substitute", None)]
    for grid in grids:
        wanted += [("find_scales", grid), ("solve", grid)] + [("refine", grid)] * sweeps
    assert called == wanted


def test_problems_are_small_but_end_like_the_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is compiled for a whole block and for the one that is left over."""
    seen: list[int] = []
    monkeypatch.setattr(gptq, "solve", lambda weight, *_: seen.append(weight.shape[1]))
    settings = Settings(grid=Grid(4, 64))
    for width in (64, 576, 14336, 11008):
        for part in warmup._parts(CPU, {Grid(4, 64): width}, settings, torch.float32):
            part()
    assert seen == [64, 512 + 64, 512, 512 + 256]


def test_a_failure_is_left_to_where_it_matters_and_leaving_ends_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end, done = threading.Event(), threading.Event(), []

    def failing() -> None:
        raise torch.OutOfMemoryError("no room")

    def slow() -> None:
        begun.set()
        may_end.wait(30)

    monkeypatch.setattr(warmup, "_apart", lambda _, work: work())
    first = warmup.WarmUp(CPU, {}, Settings(grid=Grid(4, 32)), torch.float32)
    first.parts = [failing, lambda: done.append(1)]
    with first:
        first.wait()
        assert done == [1]
        assert first.running == []
    second = warmup.WarmUp(CPU, {}, Settings(grid=Grid(4, 32)), torch.float32)
    second.parts = [slow] * 4 + [lambda: done.append(2)]
    with second:
        assert begun.wait(30)
    may_end.set()
    second.pool.shutdown(wait=True)
    assert done == [1]


def test_the_narrowest_linear_of_each_grid_stands_for_it() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(96, 4), "b": torch.nn.Linear(64, 4), "c": torch.nn.Linear(32, 4)})
    plan: Any = type("Plan", (), {"grids": {"a": Grid(4, 32), "b": Grid(4, 32), "c": Grid(8, 32)}})
    assert warmup.narrowest(model, plan) == {Grid(4, 32): 64, Grid(8, 32): 32}


def test_a_run_warms_up_before_it_quantizes_on_a_gpu_only(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the linears in the base's config, until the run ends.

    A CPU and another engine have nothing to warm up.
    """
    inside: list[Any] = []

    class Watched:
        def __init__(self, *args: Any, also: list[Any]) -> None:
            self.args = (*args, also)

        def __enter__(self) -> None:
            inside.append(self.args)

        def __exit__(self, *_: object) -> None:
            inside.append("left")

    passes = SimpleNamespace(try_out="norms and embeddings")
    monkeypatch.setattr(warmup, "FusedOps", lambda blocks, *_: len(blocks) and passes)
    monkeypatch.setattr(warmup, "WarmUp", Watched)
    prepared = prepare.prepare(recipe(project, tmp_path))
    directory = RunDirectory(tmp_path / "runs")
    with directory.open():
        called: list[tuple[Any, ...]] = []
        context = RunContext.of(prepared, directory, Watcher())
        context.ranks = SimpleNamespace(call=lambda *args, first_rank_only: called.append((*args, first_rank_only)))
        with compile_ahead(context):
            assert inside == []
        context.device = torch.device("cuda")
        with compile_ahead(context):
            ((device, widths, settings, dtype, also),) = inside
        assert inside[1] == "left"
        assert device == context.device
        assert widths == {prepared.quantize.settings.grid: 64}
        assert (settings, dtype) == (prepared.quantize.settings, prepared.quantize.dtype)
        assert also == ["norms and embeddings"]
        context.directory.remember("quantize", context.keys.quantize, {})
        with compile_ahead(context):
            assert len(inside) == 2, "what is done needs no kernels"
        assert called == [(warmup.connect, CPU, {}), (warmup.connect, context.device, {})], "and nobody to do it with"


@pytest.mark.gpu
def test_on_a_gpu_all_of_it_works() -> None:
    settings = Settings(grid=Grid(4, 32), sweeps=1, correct=0.5)
    with warmup.WarmUp(torch.device("cuda"), {Grid(4, 32): 192}, settings, torch.bfloat16) as begun:
        running = list(begun.running)
        begun.wait()
    assert len(running) == 6
    for part in running:
        part.result()


@pytest.mark.parametrize(("device", "wanted"), [("cuda", interpreter.SWITCH), ("cpu", None)])
def test_threads_let_each_other_run_sooner_beside_a_gpu_only(device: str, wanted: float | None) -> None:
    before = sys.getswitchinterval()
    with interpreter.gpu_interpreter_settings(torch.device(device)):
        assert sys.getswitchinterval() == pytest.approx(wanted or before)
    assert sys.getswitchinterval() == before
    with pytest.raises(ZeroDivisionError), interpreter.gpu_interpreter_settings(torch.device(device)):
        _ = 1 / 0
    assert sys.getswitchinterval() == before


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device that something is warmed up for, without a GPU."""
    monkeypatch.setattr(warmup, "_parts", lambda *_: [])
    monkeypatch.setattr(warmup, "_apart", lambda _, work: work())
    return SimpleNamespace(type="cuda")


SETTINGS = Settings(grid=Grid(4, 32))


def test_what_may_come_later_begins_when_all_else_is_done(pretended: Any) -> None:
    done: list[str] = []
    go_on = threading.Event()

    def part() -> None:
        go_on.wait(30)
        done.append("part")

    def later() -> None:
        done.append("later")

    with warmup.WarmUp(pretended, {}, SETTINGS, torch.float32, also=[part, lambda: None], later=later) as begun:
        assert begun.after is None
        threading.Timer(0.05, go_on.set).start()
        begun.wait()
        assert done[0] == "part"
        begun.wait_all()
        assert done == ["part", "later"]
        begun.wait_all()
        assert done == ["part", "later"]


def test_waiting_for_what_comes_later_waits_for_all_else(pretended: Any) -> None:
    done: list[str] = []
    with warmup.WarmUp(
        pretended, {}, SETTINGS, torch.float32, also=[lambda: done.append("part")], later=lambda: done.append("later")
    ) as begun:
        begun.wait_all()
    assert done == ["part", "later"]


def test_a_cpu_waits_for_nothing_that_comes_later() -> None:
    done: list[str] = []
    with warmup.WarmUp(
        CPU, {}, SETTINGS, torch.float32, also=[lambda: done.append("part")], later=lambda: done.append("later")
    ) as begun:
        begun.wait_all()
    assert done == []


def test_what_comes_later_may_fail(pretended: Any) -> None:
    """A warm-up that fails is tried again by the code that needs it."""
    tried: list[int] = []

    def failing() -> None:
        tried.append(1)
        raise RuntimeError("no compiler")

    with warmup.WarmUp(pretended, {}, SETTINGS, torch.float32, later=failing) as begun:
        begun.wait_all()
        begun.wait_all()
    assert tried == [1]


class Ring:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.itself = self


def lost() -> weakref.ref[Ring]:
    """A reference cycle without references from outside."""
    return weakref.ref(Ring())


@pytest.mark.slow
def test_what_is_set_aside_is_no_garbage_and_is_looked_at_again_afterwards(pretended: Any) -> None:
    gc.unfreeze()  # what a library may have set aside
    gc.disable()
    try:
        earlier = lost()
        with interpreter.gpu_interpreter_settings(pretended):
            assert gc.get_freeze_count() > 0, "what was there before is not looked at"
            since = lost()
            interpreter.freeze_garbage_collector(pretended)
            assert since() is None
            assert earlier() is not None
            new = lost()
            gc.collect()
            assert new() is None, "what is new is still collected"
        assert gc.get_freeze_count() == 0
        gc.collect()
        assert earlier() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_cpu_sets_nothing_aside() -> None:
    gc.unfreeze()
    gc.disable()
    try:
        held = lost()
        with interpreter.gpu_interpreter_settings(CPU):
            interpreter.freeze_garbage_collector(CPU)
            assert held() is not None
            gc.collect()
            assert held() is None
    finally:
        gc.enable()


def test_what_others_have_set_aside_stays_so(pretended: Any) -> None:
    gc.freeze()
    try:
        with interpreter.gpu_interpreter_settings(pretended):
            interpreter.freeze_garbage_collector(pretended)
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
