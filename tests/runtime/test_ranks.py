"""Several ranks against one: gloo on the CPU, this process rank 0 and one child that serves it."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.e2e import forks
from torch import Tensor

from requant.errors import InputError
from requant.formats.gptq import load_quantized
from requant.numerics.cholesky import shared_cholesky
from requant.numerics.delta_retention import Delta
from requant.numerics.grid import Grid
from requant.quantize import error_correction, warmup
from requant.quantize import stage as quantize_module
from requant.quantize.background_writer import JOURNAL
from requant.quantize.plan import Settings
from requant.quantize.stage import check_ranks, quantize
from requant.runtime import launch, ranks
from requant.runtime.ranks import ALONE, Ranks, Several

GRID = Grid(4, 32)
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def environment(rank: int, port: int, count: int = 2) -> dict[str, str]:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def second(port: int) -> None:
    """The other rank's process."""
    os.environ.update(environment(1, port))
    torch.set_num_threads(1)
    launch.together(lambda: None)


@pytest.fixture(scope="module")
def two() -> Iterator[Several]:
    """This process and one more, waiting to be called."""
    port = free_port()
    child = forks().Process(target=second, args=(port,))
    child.start()
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment(0, port).items():
            patch.setenv(key, value)
        with launch.join() as joined:
            yield joined
            joined.dismiss()
    child.join(60)
    assert child.exitcode == 0


def windows(count: int = 8, seed: int = 3) -> Tensor:
    return pico.ids(count, 32, seed=seed)


def source(tmp: Path, kind: str = "llama", **changes: Any) -> Path:
    return pico.save(pico.model(kind, **changes), tmp / "merged", torch.float16)


def run(where: Path, out: Path, ranks: Any = ALONE, settings: Settings | None = None, **options: Any) -> Any:
    out.mkdir(exist_ok=True)
    own = {k: options.pop(k) for k in ("progress", "deltas") if k in options}
    options = {"dtype": torch.float16, "device": CPU, "batch": 2} | options
    return ranks.call(
        options.pop("function", quantize),
        where,
        out,
        options.pop("windows", windows()),
        settings or Settings(GRID),
        own=own,
        **options,
    )


CORRECTED = Settings(GRID, "activation", sweeps=2, correct=0.5)
DECIDED = Settings(Grid(4, 32), "auto")


# --- what one run leaves, two leave ---


def stored(out: Path) -> dict[str, Tensor]:
    """Every weight as servers dequantize it, and everything else as it is."""
    return dict(load_quantized(out))


def assert_alike(one: Path, two: Path) -> None:
    """Sums in another order may decide a tie otherwise, nothing else: under one value in a thousand differs.

    Measured on these models: none, but where a processor's own sums put a value on the edge between two codes.
    """
    assert sorted(f.name for f in one.iterdir()) == sorted(f.name for f in two.iterdir())
    assert (one / "config.json").read_text() == (two / "config.json").read_text()
    assert_stored_alike(one, two)


def assert_stored_alike(one: Path, two: Path) -> None:
    assert differing(one, two) < 1e-3


def differing(one: Path, two: Path) -> float:
    """Share of the weights."""
    a, b = stored(one), stored(two)
    different = sum(int((a[name] != b[name]).sum()) for name in a)
    return different / sum(t.numel() for t in a.values())


@pytest.mark.parametrize(
    ("kind", "settings", "count"),
    [("llama", CORRECTED, 64), ("llama", DECIDED, 8), ("llama", CORRECTED, 7), ("qwen3_moe", CORRECTED, 8)],
    ids=["corrected", "order decided", "uneven", "experts"],
)
def test_two_ranks_write_what_one_does(tmp_path: Path, two: Several, kind: str, settings: Settings, count: int) -> None:
    """On two of three texts at least: a tie in one changes all that follows, what is wrong changes all."""
    where, alike = source(tmp_path, kind), 0
    for text in range(3):
        one, both = tmp_path / f"one-{text}", tmp_path / f"two-{text}"
        options: dict[str, Any] = {"windows": windows(count, seed=3 + text), "settings": settings}
        _, expected = run(where, one, **options)
        _, results = run(where, both, two, **options)
        assert [r.name for r in results] == [r.name for r in expected]
        tied = differing(one, both) >= 1e-3
        for got, wanted in zip(results, expected, strict=True):
            assert got.loss == pytest.approx(wanted.loss, rel=0.3 if tied else 2e-2)
            assert got.rtn_error == pytest.approx(wanted.rtn_error, rel=0.3 if tied else 2e-2)
            assert (got.damp, got.order, got.fallback) == (wanted.damp, wanted.order, wanted.fallback)
            if not tied:
                assert got.added == pytest.approx(wanted.added), "an expert's rows are counted over all ranks"
        if not tied:
            assert_alike(one, both)
            alike += 1
        if alike == 2:
            return
    pytest.fail("two of three texts give other weights on two ranks")


def by_drift(*args: Any, ranks: Ranks = ALONE, **options: Any) -> Any:
    """`quantize` with the correction as a GPU has it."""
    with pytest.MonkeyPatch.context() as patch:
        for choice in (error_correction.BY_DRIFT, error_correction.SOLVERS):
            patch.setitem(choice, "cpu", choice["cuda"])
        return quantize(*args, ranks=ranks, **options)


def test_two_ranks_solve_for_the_drift_as_one_does(tmp_path: Path, two: Several) -> None:
    """q, k and v have more rows than inputs, and so have gate and up."""
    where = source(tmp_path)
    shared: list[int] = []
    gather = two.gather
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two, "gather", lambda part, rows: shared.append(part.shape[1]) or gather(part, rows))
        alike = []
        for text in range(2):
            one, both = tmp_path / f"one-{text}", tmp_path / f"two-{text}"
            options: dict[str, Any] = {
                "windows": windows(64, seed=3 + text),
                "settings": CORRECTED,
                "function": by_drift,
            }
            run(where, one, **options)
            run(where, both, two, **options)
            alike.append(differing(one, both) < 1e-3)
    assert any(alike)
    plain = 2 * len(alike) * 2 * 4  # blocks, stages, and two things a stage
    assert len(shared) == plain + 2 * len(alike) * 2


def test_what_is_left_of_a_delta_is_judged_by_the_first_rank(tmp_path: Path, two: Several) -> None:
    where = source(tmp_path)
    draw = torch.Generator().manual_seed(5)
    left = 0.01 * torch.randn(64, 4, generator=draw)
    delta = Delta(left, torch.randn(4, 64, generator=draw))
    only = "model.layers.1.self_attn.q_proj"

    def deltas(name: str) -> Delta | None:
        return delta if name == f"{only}.weight" else None

    _, one = run(where, tmp_path / "one", settings=CORRECTED, deltas=deltas)
    _, both = run(where, tmp_path / "two", two, settings=CORRECTED, deltas=deltas)
    judged = {r.name: r for r in one}[only], {r.name: r for r in both}[only]
    assert judged[1].signal == pytest.approx(judged[0].signal, rel=1e-3)
    assert judged[1].retention == pytest.approx(judged[0].retention, abs=1e-2)
    assert [r.name for r in both if r.retention is not None] == [only]


# --- killed with one number of ranks, finished with another ---


class Killed(Exception):
    pass


def cut(*args: Any, survived: int, ranks: Ranks = ALONE, **options: Any) -> None:
    """`quantize`, stopped on every rank once so many blocks are on disk."""

    def kill(done: int, _total: int, _note: str) -> None:
        if done == survived:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize_module, "BEHIND", 0)
        with pytest.raises(Killed):
            quantize(*args, **options, progress=kill, ranks=ranks)


@pytest.mark.parametrize("before", [1, 2], ids=["one, then two", "two, then one"])
def test_a_killed_run_goes_on_with_another_number_of_ranks(tmp_path: Path, two: Several, before: int) -> None:
    where = source(tmp_path, num_hidden_layers=3)
    _, expected = run(where, tmp_path / "whole", settings=CORRECTED)
    first, then = (ALONE, two) if before == 1 else (two, ALONE)
    out = tmp_path / "cut"
    out.mkdir()
    options: dict[str, Any] = {"dtype": torch.float16, "device": CPU, "batch": 2}
    first.call(cut, where, out, windows(), CORRECTED, survived=1, own={}, **options)
    kept = json.loads((out / JOURNAL).read_text())
    assert len(kept) == 1
    done: list[int] = []
    _, results = run(where, out, then, settings=CORRECTED, progress=lambda at, _total, _note: done.append(at))
    assert (done[0], done[-1]) == (1, 3), "the first block was replayed"
    assert done == sorted(set(done))
    assert [r.name for r in results] == [r.name for r in expected]
    assert_alike(tmp_path / "whole", out)


# --- what ranks say to each other ---


def say(size: int, *, ranks: Ranks) -> bool:
    """Everything that travels, checked on each rank; on both it holds or the other hangs, so the result is shared."""
    draw = torch.Generator().manual_seed(ranks.rank)
    whole, mine = torch.arange(3.0 * size).reshape(size, 3), torch.randn(size, size, generator=draw)
    parts = [torch.randn(size, size, generator=torch.Generator().manual_seed(r)) for r in range(ranks.count)]
    symmetric, other = mine @ mine.T, mine.clone()
    counts = ranks.pool([symmetric], [other], [ranks.rank + 1])
    upper = sum(p @ p.T for p in parts).triu()
    tensor = torch.full((size,), float(ranks.rank))
    ranks.spread(tensor)
    held = [
        torch.equal(ranks.gather(ranks.rows(whole), size), whole),
        counts == [3],
        torch.allclose(symmetric.triu(), upper, rtol=1e-5, atol=1e-5),
        torch.allclose(other, sum(parts[1:], parts[0]), rtol=1e-6),
        torch.equal(ranks.tell(symmetric), symmetric),  # the same bits: each rank factors its own copy
        ranks.total([0.5, ranks.rank]) == [1.0, 1.0],
        torch.equal(tensor, torch.zeros(size)),
        ranks.every(True) and not ranks.every(ranks.first) and not ranks.every(not ranks.first),
    ]
    return ranks.every(all(held))


def factored(size: int, shift: float, *, ranks: Ranks) -> tuple[float, int, bool]:
    """(Distance of the shared factor's square from the matrix, info, the same bits on all ranks)."""
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(0))
    matrix = x.T @ x / len(x) + shift * torch.eye(size)
    assert isinstance(ranks, Several)
    lower, info = shared_cholesky(matrix.clone(), ranks.rank, ranks.count, ranks._publish, block=16)
    same = ranks.every(torch.equal(ranks.tell(lower).nan_to_num(), lower.nan_to_num()))
    exact = torch.linalg.cholesky(matrix.double()) if shift > 0 else matrix.double()
    return float((lower - exact).norm() / exact.norm()), int(info), same


@pytest.mark.parametrize("size", [16, 50, 96])
def test_the_shared_factor_is_the_factor(two: Several, size: int) -> None:
    """Blocks of 16, also where they do not divide: fp32 rounding from the factor in fp64."""
    distance, info, same = two.call(factored, size, 0.05, own={})
    assert distance < 1e-5
    assert (info, same) == (0, True)


def test_no_factor_is_seen_by_all(two: Several) -> None:
    """A negative eigenvalue in a later block: info says so on every rank."""
    assert two.call(factored, 50, -3.0, own={})[1:] == (1, True)


def test_large_matrices_are_factored_together(two: Several, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "shared_cholesky", lambda *_: "together")
    monkeypatch.setattr(ranks, "SPLIT_FROM", 64)
    assert two.cholesky(torch.eye(64)) == "together"
    assert torch.equal(two.cholesky(torch.eye(63))[0], torch.eye(63))


@pytest.mark.parametrize("size", [1, 2, 3, 64])
def test_what_ranks_exchange(two: Several, size: int) -> None:
    """Also fewer rows than ranks, and numbers that do not divide."""
    assert two.call(say, size, own={})


def test_shares_are_everything_once() -> None:
    three = [Ranks() for _ in range(3)]
    for number, each in enumerate(three):
        each.rank, each.count = number, 3
    assert [list(range(10)[r.share(10)]) for r in three] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    assert list(range(10)[ALONE.share(10)]) == list(range(10))


def test_more_ranks_than_windows_are_refused() -> None:
    many = Ranks()
    many.count = 9
    with pytest.raises(InputError, match="8 calibration windows cannot be split over 9 ranks: start fewer, or raise"):
        check_ranks(8, CPU, many)


def placed(*, ranks: Ranks) -> bool:
    mine = torch.device("cuda", ranks.rank)
    return ranks.every({ranks.place(torch.device(d)) for d in ("cuda", "cuda:0", str(mine))} == {mine})


def test_each_rank_takes_its_own_gpu(two: Several) -> None:
    """Whether it was given the first rank's, its own or none by number; another is refused."""
    assert two.call(placed, own={})
    with pytest.raises(InputError, match="cuda:1 names one GPU, but 2 ranks were started: use auto or cuda"):
        two.place(torch.device("cuda", 1))
    assert two.place(CPU) == CPU
    assert ALONE.place(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with (
        pytest.raises(InputError, match="3 ranks were started where there are 2 GPUs: start 2, or hide them"),
        launch.join(),
    ):
        pass


@pytest.mark.parametrize(("said", "threads"), [("1", [2]), ("3", []), (None, [])])
def test_a_rank_on_a_gpu_uses_its_share_of_the_cores(
    said: str | None, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torchrun left it one thread; other numbers are somebody's choice."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setattr(launch, "_cores", lambda: 5)
    monkeypatch.setattr(launch, "rendezvous", lambda *_, **__: iter(()))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    with pytest.raises((RuntimeError, StopIteration)), launch.join():
        pass
    assert taken == threads
    assert launch._cores() >= 1


def test_nobody_looks_into_the_store_when_a_rank_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python aborts a process whose thread is in there when it ends, and the store may go with the first rank."""
    leaving = Several.__new__(Several)
    leaving.over = threading.Event()

    def watch() -> None:
        leaving.over.wait(30)
        time.sleep(0.2)  # still asking

    leaving.watching = threading.Thread(target=watch)
    leaving.watching.start()
    alive: list[bool] = []
    monkeypatch.setattr(Several, "every", lambda self, _: alive.append(self.watching.is_alive()))
    leaving._end()
    assert alive == [False]


def test_gpus_meet_beside_what_comes_next_and_once(two: Several, monkeypatch: pytest.MonkeyPatch) -> None:
    go, begun = threading.Event(), []
    monkeypatch.setattr(ranks, "_first_sum", lambda device: begun.append(device) or go.wait(60))
    two.meet(CPU)
    assert two.meeting is None, "gloo has met"
    gpu = torch.device("cuda", 0)
    two.meet(gpu)
    meeting = two.meeting
    assert meeting is not None
    two.meet(gpu)
    assert two.meeting is meeting
    assert not meeting.done()
    waiting = threading.Thread(target=two._met)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    go.set()
    waiting.join(60)
    two.meet(gpu)
    assert (two.meeting, begun) == (meeting, [gpu])
    two.meeting = None  # this is everybody's


def test_whatever_gpus_say_to_each_other_waits_until_they_have_met(
    two: Several, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Waits(Exception):
        pass

    def waits() -> None:
        raise Waits

    def spoken(*_: Any, **__: Any) -> None:
        pytest.fail("a call on GPUs before they have met")  # which would wait for the other rank for good

    monkeypatch.setattr(two, "_met", waits)
    monkeypatch.setattr(two, "total", list)
    for name in ("all_reduce", "broadcast"):
        monkeypatch.setattr(ranks.dist, name, spoken)
    monkeypatch.setattr(ranks, "_all_gather", spoken)
    monkeypatch.setattr(ranks, "SPLIT_FROM", 4)
    x = torch.eye(4)
    calls: list[Callable[[], object]] = [
        lambda: two.pool([x], [], [1]), lambda: two.gather(x, 4), lambda: two.cholesky(x), lambda: two.spread(x),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(Waits):
            call()


def test_a_meeting_that_fails_says_so_where_it_is_needed(two: Several, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: torch.device) -> None:
        raise RuntimeError("no way to the other GPU")

    monkeypatch.setattr(ranks, "_first_sum", fails)
    two.meet(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match="no way"):
        two._met()
    two.part()
    two.meeting = None  # this is everybody's


def test_counts_are_summed_before_a_gpu_is_given_anything(two: Several, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for the other hosts while GPUs still work."""
    order: list[str] = []
    monkeypatch.setattr(two, "total", lambda counts: order.append("counts") or [2.0 * n for n in counts])
    monkeypatch.setattr(ranks.dist, "all_reduce", lambda _: order.append("sum"))
    assert two.pool([torch.eye(3)], [torch.eye(3)], [4, 1]) == [8, 2]
    assert order == ["counts", "sum", "sum"]


class Placed(Ranks):
    """One process that says what it was asked."""

    def __init__(self) -> None:
        self.met: list[torch.device] = []

    def place(self, device: torch.device) -> torch.device:
        return torch.device("meta") if device.type == "cuda" else device

    def meet(self, device: torch.device) -> None:
        self.met.append(device)


def test_ranks_meet_where_each_is_placed_and_when_they_quantize(tmp_path: Path) -> None:
    placed = Placed()
    warmup.meet(torch.device("cuda"), ranks=placed)
    assert placed.met == [torch.device("meta")]
    (tmp_path / "out").mkdir()
    options: dict[str, Any] = {"dtype": torch.float16, "device": CPU, "ranks": placed}
    quantize(source(tmp_path), tmp_path / "out", windows(), Settings(GRID), **options)
    assert placed.met == [torch.device("meta"), CPU]


def test_what_has_not_met_is_waited_for_before_the_end(two: Several, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ending torch.distributed while NCCL meets leaves the other ranks there."""
    done: list[bool] = []
    monkeypatch.setattr(ranks, "_first_sum", lambda _: time.sleep(0.3) or done.append(True))
    two.meet(torch.device("cuda", 0))
    two.part()
    assert done == [True]
    two.meeting = None
