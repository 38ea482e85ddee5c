"""`requant.quantize.calibration_plan`: which batches wait, run unquantized, are held out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import pico
from helpers.devices import set_profile
from helpers.quantizing import CPU, GRID
from torch import Tensor

from requant.checkpoint.reader import Checkpoint
from requant.modeling import skeleton
from requant.modeling.block_walk import Walk
from requant.modeling.blocks import block_list
from requant.quantize import calibration_plan, memory
from requant.quantize.calibration_plan import CalibrationPlan, batch_size, plan_calibration
from requant.quantize.plan import Settings
from requant.runtime.ranks import SINGLE_PROCESS, Ranks

AUTO = Settings(grid=GRID, order="auto")
CORRECTED = Settings(grid=GRID, order="auto", correct=0.5)
WIDEST = 128  # inputs of the widest linear: 8 tokens for each are enough of the unquantized model


@dataclass
class Rank(Ranks):
    """One of several ranks; `theirs` is the other ranks' answer in `Ranks.all`."""

    rank: int
    count: int
    theirs: bool = True

    def all(self, holds: bool) -> bool:
        return holds and self.theirs


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    path = pico.save(pico.model(), tmp_path_factory.mktemp("walk") / "model")
    model = skeleton.open_model(path)
    return Walk(Checkpoint(path), model, device=CPU, dtype=torch.float32)


@pytest.fixture
def on_gpu(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make the walk's device a GPU with the given number of free bytes."""

    def free(nbytes: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (nbytes, 10**12))

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(walk, "device", torch.device("cuda"))
    set_profile(monkeypatch, "cuda", least_unquantized_tokens=0)
    return free


def tokens(windows: int, length: int = 32) -> Tensor:
    return torch.zeros(windows, length, dtype=torch.int64)


def test_one_rank(walk: Walk) -> None:
    """64 windows of 32 tokens: 2048, of which half are enough to measure the drift."""
    plan = plan_calibration(walk, tokens(64), CORRECTED, SINGLE_PROCESS, batch=4)
    assert 2 * 8 * WIDEST == 64 * 32
    assert plan == CalibrationPlan(
        share=slice(0, 64),
        batches=(4,) * 16,
        unquantized=(0, 2, 4, 6, 8, 10, 12, 14),
        first_held_out=14,
        inside_block=True,
        waiting_bytes=0,
    )
    assert not plan.on_host


def test_a_last_batch_may_be_smaller(walk: Walk) -> None:
    plan = plan_calibration(walk, tokens(10), AUTO, SINGLE_PROCESS, batch=4)
    assert plan.batches == (4, 4, 2)
    assert plan.first_held_out == 2


@pytest.mark.parametrize(("settings", "batches"), [(CORRECTED, (0,)), (AUTO, ())], ids=["corrected", "correct=0"])
def test_only_correction_runs_the_unquantized_model(walk: Walk, settings: Settings, batches: tuple[int, ...]) -> None:
    assert plan_calibration(walk, tokens(8), settings, SINGLE_PROCESS, batch=8).unquantized == batches


def test_where_text_is_short_every_batch_also_runs_unquantized(walk: Walk) -> None:
    assert plan_calibration(walk, tokens(32), CORRECTED, SINGLE_PROCESS, batch=8).unquantized == (0, 1, 2, 3)


@pytest.mark.parametrize(
    "settings",
    [replace(AUTO, sweeps=2), replace(AUTO, order="activation"), replace(AUTO, order="group")],
    ids=["sweeps", "activation", "group"],
)
def test_no_batch_is_held_out_where_the_order_is_not_judged(walk: Walk, settings: Settings) -> None:
    assert plan_calibration(walk, tokens(64), settings, SINGLE_PROCESS, batch=4).first_held_out is None


def test_one_batch_in_all_is_not_held_out(walk: Walk) -> None:
    plan = plan_calibration(walk, tokens(8), AUTO, SINGLE_PROCESS, batch=8)
    assert (plan.batches, plan.first_held_out) == ((8,), None)


def test_the_batch_size_follows_the_length(walk: Walk) -> None:
    assert batch_size(CPU, tokens(64, 512)) == 4
    assert batch_size(torch.device("cuda"), tokens(64, 512)) == 16
    assert batch_size(CPU, tokens(64, 10**5)) == 1
    assert batch_size(CPU, tokens(64, 512), walk.blocks) == 4
    assert plan_calibration(walk, tokens(8, 512), AUTO, SINGLE_PROCESS).batches == (4, 4)


def test_batches_of_experts_are_larger(walk: Walk) -> None:
    """Four times the tokens, also where few blocks have experts; no fewer than eight batches."""
    experts = [*walk.blocks, *block_list(skeleton.build(pico.config("qwen3_moe"), split=True))[1]]
    assert batch_size(CPU, tokens(128, 512), experts) == 16
    assert batch_size(CPU, tokens(64, 512), experts) == 8, "16 would be four batches"
    assert batch_size(CPU, tokens(16, 512), experts) == 4, "as without experts"


def test_ranks_share_what_one_rank_would_do(walk: Walk) -> None:
    """Ranks number batches as one rank would; here each rank's begin at one of those."""
    alone = plan_calibration(walk, tokens(64), CORRECTED, SINGLE_PROCESS, batch=4)
    plans = [plan_calibration(walk, tokens(64), CORRECTED, Rank(r, 4), batch=4) for r in range(4)]
    assert [p.share for p in plans] == [slice(16 * r, 16 * r + 16) for r in range(4)]
    assert sum((p.batches for p in plans), ()) == alone.batches
    assert tuple(4 * r + i for r, p in enumerate(plans) for i in p.unquantized) == alone.unquantized
    assert [p.first_held_out for p in plans] == [4, 4, 4, 2], "only the last rank has batches that judge"


def test_ranks_whose_windows_do_not_divide(walk: Walk) -> None:
    """11 windows in batches of 2 are 6 for one rank: 0 .. 5; rank 1 begins inside number 2.

    It begins at window 5.
    """
    first, second = (plan_calibration(walk, tokens(11, 256), CORRECTED, Rank(r, 2), batch=2) for r in (0, 1))
    assert (first.share, first.batches) == (slice(0, 5), (2, 2, 1))
    assert (second.share, second.batches) == (slice(5, 11), (2, 2, 2))
    assert memory.unquantized_every(walk, tokens(11, 256)) == 3
    assert first.unquantized == (0,), "numbers 0, 1, 2"
    assert second.unquantized == (1,), "numbers 2, 3, 4"
    assert (first.first_held_out, second.first_held_out) == (3, 3), "number 5 would judge, and no rank has it"


def test_batches_pause_inside_a_block_where_they_fit(walk: Walk, on_gpu: Callable[[int], None]) -> None:
    """By one rank's share of free memory, reference included; that much is reserved."""
    need = memory.waiting_bytes(walk, 64 * 32, 1 / 2)
    assert need > memory.waiting_bytes(walk, 64 * 32, 0)
    on_gpu(int(need / memory.MEMORY_SHARE) + 2)
    plan = plan_calibration(walk, tokens(64), CORRECTED, SINGLE_PROCESS, batch=4)
    assert (plan.inside_block, plan.on_host, plan.waiting_bytes) == (True, False, need)
    on_gpu(int(need / memory.MEMORY_SHARE) - 2)
    plan = plan_calibration(walk, tokens(64), CORRECTED, SINGLE_PROCESS, batch=4)
    assert (plan.inside_block, plan.on_host, plan.waiting_bytes) == (False, True, 0)
    assert plan.unquantized == (0, 2, 4, 6, 8, 10, 12, 14), "wherever they wait"


def test_several_ranks_take_less_and_agree(walk: Walk, on_gpu: Callable[[int], None]) -> None:
    """Each rank asks for its own share of the windows; if one lacks memory, none pauses."""
    need = memory.waiting_bytes(walk, 32 * 32, 0)
    on_gpu(int(need / memory.MEMORY_SHARE_OF_RANKS) + 2)
    assert plan_calibration(walk, tokens(64), AUTO, Rank(1, 2), batch=4).waiting_bytes == need
    assert plan_calibration(walk, tokens(64), AUTO, Rank(1, 2, theirs=False), batch=4).on_host
    on_gpu(int(need / memory.MEMORY_SHARE_OF_RANKS) - 2)
    assert plan_calibration(walk, tokens(64), AUTO, Rank(1, 2), batch=4).on_host


def test_memory_is_reserved_only_when_asked(
    walk: Walk, on_gpu: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(calibration_plan, "reserve_memory", lambda _, nbytes: taken.append(nbytes))
    on_gpu(10**12)
    plan = plan_calibration(walk, tokens(64), AUTO, SINGLE_PROCESS, batch=4)
    assert taken == []
    plan.reserve(walk.device)
    assert taken == [memory.waiting_bytes(walk, 64 * 32, 0)]
    lean = plan.leaner()
    assert lean is not None
    lean.reserve(walk.device)
    assert len(taken) == 1


def test_a_cpu_reserves_nothing(walk: Walk, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(calibration_plan, "reserve_memory", lambda _, nbytes: taken.append(nbytes))
    plan_calibration(walk, tokens(64), AUTO, SINGLE_PROCESS, batch=4).reserve(CPU)
    assert taken == []


def test_leaner_plans_end_at_one_window() -> None:
    plan = CalibrationPlan(
        share=slice(3, 12), batches=(4, 3, 2), unquantized=(0, 2), first_held_out=2, inside_block=True, waiting_bytes=7
    )
    rerun = plan.leaner()
    assert rerun == replace(plan, inside_block=False, waiting_bytes=0), "first the same batches, not paused"
    assert rerun is not None
    halved = rerun.leaner()
    assert halved is not None
    assert halved == replace(rerun, batches=(2, 2, 2, 1, 1, 1), unquantized=(0, 1, 4, 5), first_held_out=4)
    single = halved.leaner()
    assert single is not None
    assert single == replace(rerun, batches=(1,) * 9, unquantized=(0, 1, 2, 3, 7, 8), first_held_out=7)
    assert single.leaner() is None


@pytest.mark.parametrize("first_held_out", [None, 0, 1, 2])
def test_a_leaner_plan_holds_out_the_same_windows(first_held_out: int | None) -> None:
    plan = CalibrationPlan(
        share=slice(0, 8),
        batches=(5, 3),
        unquantized=(),
        first_held_out=first_held_out,
        inside_block=False,
        waiting_bytes=0,
    )
    lean = plan.leaner()
    assert lean is not None
    assert lean.batches == (3, 2, 2, 1)
    before, after = (
        [] if n is None else p.batches[:n] for p, n in ((plan, first_held_out), (lean, lean.first_held_out))
    )
    assert (lean.first_held_out is None) == (first_held_out is None)
    assert sum(before) == sum(after)


@torch.no_grad()
def test_a_leaner_plan_is_what_the_walk_halves(walk: Walk) -> None:
    plan: CalibrationPlan | None = plan_calibration(
        walk, pico.ids(11, 32), replace(CORRECTED, correct=0.0), SINGLE_PROCESS, batch=4
    )
    items = walk.embed(pico.ids(11, 32), 4)
    sizes = []
    while (plan := plan and plan.leaner()) is not None:
        if sizes:
            items = walk.halved(items)
        assert plan.batches == tuple(len(item.hidden) for item in items)
        sizes.append(len(items))
    assert sizes == [3, 6, 11]
