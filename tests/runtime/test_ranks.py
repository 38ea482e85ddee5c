"""`requant.runtime.ranks`: several against one; gloo, this process and one child."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.ranks import two_ranks
from helpers.stagewise import assert_compared, assert_same_files, led, recorded
from torch import Tensor

from requant.checkpoint.journal import Journal
from requant.errors import InputError
from requant.numerics.cholesky import shared_cholesky
from requant.numerics.delta_retention import Delta
from requant.numerics.grid import Grid
from requant.quantize import solve, warmup
from requant.quantize import stage as quantize_module
from requant.quantize.background_writer import JOURNAL
from requant.quantize.plan import Settings
from requant.quantize.stage import check_ranks, quantize
from requant.runtime import launch, ranks
from requant.runtime.ranks import SINGLE_PROCESS, DistributedRanks, Ranks

GRID = Grid(4, 32)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def two() -> Iterator[DistributedRanks]:
    with two_ranks() as joined:
        yield joined


def windows(count: int = 8, seed: int = 3) -> Tensor:
    return pico.ids(count, 32, seed=seed)


def source(tmp: Path, kind: str = "llama", **changes: Any) -> Path:
    return pico.save(pico.model(kind, **changes), tmp / "merged", torch.float16)


def run(where: Path, out: Path, ranks: Any = SINGLE_PROCESS, settings: Settings | None = None, **options: Any) -> Any:
    out.mkdir(exist_ok=True)
    own = {k: options.pop(k) for k in ("progress", "deltas") if k in options}
    options = {"dtype": torch.float16, "device": CPU, "batch": 2} | options
    return ranks.call(
        options.pop("function", quantize),
        where,
        out,
        options.pop("windows", windows()),
        settings or Settings(grid=GRID),
        first_rank_only=own,
        **options,
    )


CORRECTED = Settings(grid=GRID, order="activation", sweeps=2, correct=0.5)
DECIDED = Settings(grid=Grid(4, 32), order="auto")


# --- what one run leaves, two leave ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "settings", "count", "stages"),
    [
        ("llama", CORRECTED, 64, 8), ("llama", DECIDED, 8, 8), ("llama", CORRECTED, 7, 8),
        ("qwen3_moe", CORRECTED, 8, 2 * (2 + 2 * 4)),
    ],
    ids=["corrected", "order decided", "uneven", "experts"],
)  # fmt: skip
def test_two_ranks_write_what_one_does(
    tmp_path: Path, two: DistributedRanks, kind: str, settings: Settings, count: int, stages: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    where, one, both = source(tmp_path, kind), tmp_path / "one", tmp_path / "two"
    options: dict[str, Any] = {"windows": windows(count), "settings": settings, "steps": {}}
    gaps, topk = [1.0], torch.topk

    def chosen(values: Tensor, k: int, *args: Any, **more: Any) -> Any:
        best = topk(values, k + 1).values
        gaps.append(float((best[..., -2] - best[..., -1]).min()))
        return topk(values, k, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "topk", chosen)
        _, expected = run(where, one, function=recorded, **options)
    assert min(gaps) > 1e-5, "no token is undecided between two experts"
    results, compared = run(where, both, two, function=led, **options)
    assert_compared(compared, stages * 2)
    assert results == expected, "an expert's rows are counted over all ranks"
    assert_same_files(one, both)


@pytest.mark.slow
def test_two_ranks_solve_for_the_drift_as_one_does(tmp_path: Path, two: DistributedRanks) -> None:
    """q, k, v and gate, up have more rows than inputs, so the drift is solved for."""
    where = source(tmp_path)
    options: dict[str, Any] = {"windows": windows(64), "settings": CORRECTED, "steps": {}, "like_a_gpu": True}
    shared: list[int] = []
    gather = two.all_gather_rows
    run(where, tmp_path / "one", function=recorded, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two, "all_gather_rows", lambda part, rows: shared.append(part.shape[1]) or gather(part, rows))
        _, compared = run(where, tmp_path / "two", two, function=led, **options)
    assert_compared(compared, 8 * 2)
    plain = 2 * 2 * 4  # blocks, stages, and two things a stage
    assert len(shared) == plain + 2 * 2


def test_two_ranks_left_to_themselves_lose_what_one_does(tmp_path: Path, two: DistributedRanks) -> None:
    """A code on a rounding edge changes later ones, so losses differ elsewhere by as much.

    Neither run is led here.
    """
    where = source(tmp_path)
    _, expected = run(where, tmp_path / "one", settings=CORRECTED)
    _, results = run(where, tmp_path / "two", two, settings=CORRECTED)
    assert [(r.name, r.damp, r.order, r.fallback) for r in results] == [
        (r.name, r.damp, r.order, r.fallback) for r in expected
    ]
    assert sum(r.loss for r in results) == pytest.approx(sum(r.loss for r in expected), rel=0.1)
    assert sorted(f.name for f in (tmp_path / "one").iterdir()) == sorted(f.name for f in (tmp_path / "two").iterdir())


def test_what_is_left_of_a_delta_is_judged_by_the_first_rank(tmp_path: Path, two: DistributedRanks) -> None:
    where, steps = source(tmp_path), {}  # type: ignore[var-annotated]
    draw = torch.Generator().manual_seed(5)
    left = 0.01 * torch.randn(64, 4, generator=draw)
    delta = Delta(left, torch.randn(4, 64, generator=draw))
    only = "model.layers.1.self_attn.q_proj"

    def deltas(name: str) -> Delta | None:
        return delta if name == f"{only}.weight" else None

    options: dict[str, Any] = {"settings": CORRECTED, "deltas": deltas, "steps": steps}
    _, one = run(where, tmp_path / "one", function=recorded, **options)
    both, _ = run(where, tmp_path / "two", two, function=led, **options)
    judged = {r.name: r for r in one}[only], {r.name: r for r in both}[only]
    assert judged[1].signal == pytest.approx(judged[0].signal, rel=1e-3)
    assert judged[1].retention == pytest.approx(judged[0].retention, abs=1e-2)
    assert [r.name for r in both if r.retention is not None] == [only]


# --- killed with one number of ranks, finished with another ---


class Killed(Exception):
    pass


def cut(*args: Any, survived: int, ranks: Ranks = SINGLE_PROCESS, **options: Any) -> None:
    """`led`, stopped on every rank once so many blocks are on disk."""

    def kill(done: int, _total: int, _note: str) -> None:
        if done == survived:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize_module, "BEHIND", 0)
        with pytest.raises(Killed):
            led(*args, **options, progress=kill, ranks=ranks)


@pytest.mark.slow
@pytest.mark.parametrize("before", [1, 2], ids=["one, then two", "two, then one"])
def test_a_killed_run_goes_on_with_another_number_of_ranks(tmp_path: Path, two: DistributedRanks, before: int) -> None:
    where, steps = source(tmp_path, num_hidden_layers=3), {}  # type: ignore[var-annotated]
    _, expected = run(where, tmp_path / "whole", function=recorded, settings=CORRECTED, steps=steps)
    first, then = (SINGLE_PROCESS, two) if before == 1 else (two, SINGLE_PROCESS)
    out = tmp_path / "cut"
    out.mkdir()
    options: dict[str, Any] = {"dtype": torch.float16, "device": CPU, "batch": 2, "steps": steps}
    first.call(cut, where, out, windows(), CORRECTED, survived=1, first_rank_only={}, **options)
    kept = Journal(out / JOURNAL).blocks
    assert len(kept) == 1
    done: list[int] = []
    results, compared = run(
        where, out, then, function=led, settings=CORRECTED, steps=steps,
        progress=lambda at, _total, _note: done.append(at),
    )  # fmt: skip
    assert (done[0], done[-1]) == (1, 3), "the first block was replayed"
    assert done == sorted(set(done))
    assert_compared(compared, 2 * 4 * then.count)
    assert results == expected
    assert_same_files(tmp_path / "whole", out)


# --- what ranks say to each other ---


def say(size: int, *, ranks: Ranks) -> bool:
    """Check every collective on each rank and share the result, so that neither rank hangs."""
    draw = torch.Generator().manual_seed(ranks.rank)
    whole, mine = torch.arange(3.0 * size).reshape(size, 3), torch.randn(size, size, generator=draw)
    parts = [torch.randn(size, size, generator=torch.Generator().manual_seed(r)) for r in range(ranks.count)]
    symmetric, other = mine @ mine.T, mine.clone()
    counts = ranks.all_reduce([symmetric], [other], [ranks.rank + 1])
    upper = sum(p @ p.T for p in parts).triu()
    tensor = torch.full((size,), float(ranks.rank))
    ranks.broadcast_tensor(tensor)
    held = [
        torch.equal(ranks.all_gather_rows(ranks.own_rows(whole), size), whole),
        counts == [3],
        torch.allclose(symmetric.triu(), upper, rtol=1e-5, atol=1e-5),
        torch.allclose(other, sum(parts[1:], parts[0]), rtol=1e-6),
        torch.equal(ranks.broadcast(symmetric), symmetric),  # the same bits: each rank factors its own copy
        ranks.sum([0.5, ranks.rank]) == [1.0, 1.0],
        torch.equal(tensor, torch.zeros(size)),
        ranks.all(True) and not ranks.all(ranks.first) and not ranks.all(not ranks.first),
    ]
    return ranks.all(all(held))


def factored(size: int, shift: float, *, ranks: Ranks) -> tuple[float, int, bool]:
    """(Distance of the shared factor's square from the matrix, info, equal bits on all ranks)."""
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(0))
    matrix = x.T @ x / len(x) + shift * torch.eye(size)
    assert isinstance(ranks, DistributedRanks)
    lower, info = shared_cholesky(matrix.clone(), ranks.rank, ranks.count, ranks.broadcast_async, block=16)
    same = ranks.all(torch.equal(ranks.broadcast(lower).nan_to_num(), lower.nan_to_num()))
    exact = torch.linalg.cholesky(matrix.double()) if shift > 0 else matrix.double()
    return float((lower - exact).norm() / exact.norm()), int(info), same


@pytest.mark.parametrize("size", [16, 50, 96])
def test_the_shared_factor_is_the_factor(two: DistributedRanks, size: int) -> None:
    """Blocks of 16, also where they do not divide: fp32 rounding from the factor in fp64."""
    distance, info, same = two.call(factored, size, 0.05, first_rank_only={})
    assert distance < 1e-5
    assert (info, same) == (0, True)


def test_no_factor_is_seen_by_all(two: DistributedRanks) -> None:
    """A negative eigenvalue in a later block: info says so on every rank."""
    assert two.call(factored, 50, -3.0, first_rank_only={})[1:] == (1, True)


def test_large_matrices_are_factored_together(two: DistributedRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "shared_cholesky", lambda *_: "together")
    monkeypatch.setattr(solve, "SPLIT_FROM", 64)
    assert solve.cholesky_of(torch.eye(64), ranks=two) == "together"
    assert torch.equal(solve.cholesky_of(torch.eye(63), ranks=two)[0], torch.eye(63))
    assert torch.equal(solve.cholesky_of(torch.eye(64), ranks=SINGLE_PROCESS)[0], torch.eye(64))


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_what_ranks_exchange(two: DistributedRanks, size: int) -> None:
    """Also fewer rows than ranks, and numbers that do not divide."""
    assert two.call(say, size, first_rank_only={})


def test_shares_are_everything_once() -> None:
    three = [Ranks() for _ in range(3)]
    for number, each in enumerate(three):
        each.rank, each.count = number, 3
    assert [list(range(10)[r.share(10)]) for r in three] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    assert list(range(10)[SINGLE_PROCESS.share(10)]) == list(range(10))


def test_more_ranks_than_windows_are_refused() -> None:
    many = Ranks()
    many.count = 9
    with pytest.raises(InputError, match="8 calibration windows cannot be split over 9 ranks: start fewer, or raise"):
        check_ranks(8, CPU, many)


def placed(*, ranks: Ranks) -> bool:
    mine = torch.device("cuda", ranks.rank)
    return ranks.all({ranks.device_of(torch.device(d)) for d in ("cuda", "cuda:0", str(mine))} == {mine})


def test_each_rank_takes_its_own_gpu(two: DistributedRanks) -> None:
    """Given the first rank's GPU, its own, or no number; any other GPU is refused."""
    assert two.call(placed, first_rank_only={})
    with pytest.raises(InputError, match="cuda:1 names one GPU, but 2 ranks were started: use auto or cuda"):
        two.device_of(torch.device("cuda", 1))
    assert two.device_of(CPU) == CPU
    assert SINGLE_PROCESS.device_of(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with (
        pytest.raises(InputError, match="3 ranks were started where there are 2 GPUs: start 2, or hide them"),
        launch.join_ranks(),
    ):
        pass


@pytest.mark.parametrize(("said", "cores", "threads"), [("1", 5, [2]), ("1", 64, [8]), ("3", 5, []), (None, 5, [])])
def test_a_rank_on_a_gpu_uses_its_share_of_the_cores(
    said: str | None, cores: int, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only if torchrun set one thread; other numbers were chosen by the user."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(launch, "_cores", lambda: cores)
    monkeypatch.setattr(launch, "rendezvous", lambda *_, **__: iter(()))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    with pytest.raises((RuntimeError, StopIteration)), launch.join_ranks():
        pass
    assert taken == threads
    assert launch._cores() >= 1


def test_nobody_looks_into_the_store_when_a_rank_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watching thread ends before a rank leaves.

    Python aborts a process that ends while a thread is in the store, and the store may end with the first rank.
    """
    leaving = DistributedRanks.__new__(DistributedRanks)
    leaving.over = threading.Event()

    def watch() -> None:
        leaving.over.wait(30)
        time.sleep(0.2)  # still asking

    leaving.watching = threading.Thread(target=watch)
    leaving.watching.start()
    alive: list[bool] = []
    monkeypatch.setattr(DistributedRanks, "all", lambda self, holds: alive.append(self.watching.is_alive()))
    leaving._end()
    assert alive == [False]


def test_gpus_meet_beside_what_comes_next_and_once(two: DistributedRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun = threading.Event(), []
    monkeypatch.setattr(ranks, "_first_sum", lambda device: begun.append(device) or go.wait(60))
    two.connect(CPU)
    assert two.connecting is None, "gloo has met"
    gpu = torch.device("cuda", 0)
    two.connect(gpu)
    meeting = two.connecting
    assert meeting is not None
    two.connect(gpu)
    assert two.connecting is meeting
    assert not meeting.done()
    waiting = threading.Thread(target=two._wait_for_connection)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    go.set()
    waiting.join(60)
    two.connect(gpu)
    assert (two.connecting, begun) == (meeting, [gpu])
    two.connecting = None  # this is everybody's


def test_whatever_gpus_say_to_each_other_waits_until_they_have_met(
    two: DistributedRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waits(Exception):
        pass

    def waits() -> None:
        raise Waits

    def spoken(*_: Any, **__: Any) -> None:
        pytest.fail("a call on GPUs before they have met")  # which would wait for the other rank for good

    monkeypatch.setattr(two, "_wait_for_connection", waits)
    monkeypatch.setattr(two, "sum", list)
    for name in ("all_reduce", "broadcast"):
        monkeypatch.setattr(ranks.dist, name, spoken)
    monkeypatch.setattr(ranks, "_all_gather", spoken)
    x = torch.eye(4)
    calls: list[Callable[[], object]] = [
        lambda: two.all_reduce([x], [], [1]),
        lambda: two.all_gather_rows(x, 4),
        lambda: two.broadcast_async(x, 0),
        lambda: two.broadcast_tensor(x),
    ]
    for call in calls:
        with pytest.raises(Waits):
            call()


def test_a_meeting_that_fails_says_so_where_it_is_needed(
    two: DistributedRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: torch.device) -> None:
        raise RuntimeError("no way to the other GPU")

    monkeypatch.setattr(ranks, "_first_sum", fails)
    two.connect(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="no way"):
        two._wait_for_connection()
    two.finish_connecting()
    two.connecting = None  # this is everybody's


def test_counts_are_summed_before_a_gpu_is_given_anything(
    two: DistributedRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host waits for the other hosts while GPUs still work."""
    order: list[str] = []
    monkeypatch.setattr(two, "sum", lambda counts: order.append("counts") or [2.0 * n for n in counts])
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda _: order.append("sum"))
    assert two.all_reduce([torch.eye(3)], [torch.eye(3)], [4, 1]) == [8, 2]
    assert order == ["counts", "sum", "sum"]


class Placed(Ranks):
    """One process that records its calls."""

    def __init__(self) -> None:
        self.met: list[torch.device] = []

    def device_of(self, device: torch.device) -> torch.device:
        return torch.device("meta") if device.type == "cuda" else device

    def connect(self, device: torch.device) -> None:
        self.met.append(device)


def test_ranks_meet_where_each_is_placed_and_when_they_quantize(tmp_path: Path) -> None:
    placed = Placed()
    warmup.connect(torch.device("cuda"), ranks=placed)
    assert placed.met == [torch.device("meta")]
    (tmp_path / "out").mkdir()
    options: dict[str, Any] = {"dtype": torch.float16, "device": CPU, "ranks": placed}
    quantize(source(tmp_path), tmp_path / "out", windows(), Settings(grid=GRID), **options)
    assert placed.met == [torch.device("meta"), CPU]


def test_what_has_not_met_is_waited_for_before_the_end(two: DistributedRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ending torch.distributed while NCCL connects would leave the other ranks waiting."""
    done: list[bool] = []
    monkeypatch.setattr(ranks, "_first_sum", lambda _: time.sleep(0.3) or done.append(True))
    two.connect(torch.device("cuda", 0))
    two.finish_connecting()
    assert done == [True]
    two.connecting = None
