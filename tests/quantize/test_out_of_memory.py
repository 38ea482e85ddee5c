"""`requant.quantize.out_of_memory`: the block restarts and the result does not change."""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.devices import set_profile
from helpers.e2e import one_thread
from helpers.quantizing import GRID, model_dir, run
from helpers.stagewise import assert_compared, led, recorded

from requant.checkpoint.journal import Journal
from requant.errors import StageError
from requant.formats.registry import FORMATS
from requant.modeling.block_walk import Walk
from requant.modeling.hidden_state_store import HiddenStateStore
from requant.quantize import block_quantizer
from requant.quantize.out_of_memory import OutOfMemoryRecovery
from requant.quantize.plan import Settings
from requant.runtime.interpreter import freeze_garbage_collector

CORRECTED = Settings(grid=GRID, correct=0.5)
WAITING = "out of memory with 4 batches waiting inside a block, went on with one at a time"


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with one_thread():
        yield


def full() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory")


def fails_once(monkeypatch: pytest.MonkeyPatch, at: int, owner: Any, name: str) -> list[int]:
    """Let call number `at` of a method run out of memory; returns a list that counts calls."""
    original, calls = getattr(owner, name), [0]

    def limited(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise full()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, staticmethod(limited) if owner is Walk else limited)
    return calls


def digest(out: Path) -> str:
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [Settings(grid=GRID), CORRECTED, Settings(grid=GRID, order="auto")], ids=["plain", "corrected", "auto"]
)
@pytest.mark.parametrize("at", [1, 3, 6, 9])
def test_a_block_begins_again_from_its_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings, at: int
) -> None:
    """The failing forward finds the stages, or is one of the first block or of the second."""
    source, notes = model_dir(tmp_path), []  # type: ignore[var-annotated]
    _, expected = run(source, tmp_path / "whole", settings)
    calls = fails_once(monkeypatch, at, Walk, "forward")
    _, results = run(source, tmp_path / "again", settings, notes=notes)
    assert calls[0] > at
    assert [n.split(": ")[1] for n in notes] == [WAITING]
    assert digest(tmp_path / "again") == digest(tmp_path / "whole")
    assert results == expected


@pytest.mark.slow
@pytest.mark.parametrize("settings", [Settings(grid=GRID), CORRECTED], ids=["plain", "corrected"])
@pytest.mark.parametrize("behind", [1, 2, 4])
def test_after_the_last_stage_only_those_behind_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings, behind: int
) -> None:
    """Out of memory after the last solve: no batch runs through the block twice."""
    source, notes = model_dir(tmp_path), []  # type: ignore[var-annotated]
    run(source, tmp_path / "whole", settings)
    embedded = 8 if settings.correct else 4
    fails_once(monkeypatch, embedded + behind, HiddenStateStore, "put")
    run(source, tmp_path / "again", settings, notes=notes)
    assert not notes, "nothing was asked to take less: the rest simply followed"
    assert digest(tmp_path / "again") == digest(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("settings", [CORRECTED, Settings(grid=GRID, order="auto")], ids=["corrected", "auto"])
def test_batches_are_halved_down_to_what_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    source, notes, steps = model_dir(tmp_path), [], {}  # type: ignore[var-annotated]
    run(source, tmp_path / "whole", settings, batch=4, function=recorded, steps=steps)
    forward = Walk.forward

    def limited(block: Any, hidden: Any, others: Any) -> Any:
        if hidden is not None and len(hidden) > 1:
            raise full()
        return forward(block, hidden, others)

    monkeypatch.setattr(Walk, "forward", staticmethod(limited))
    _, compared = run(source, tmp_path / "again", settings, batch=4, notes=notes, function=led, steps=steps)
    assert [n.partition(": ")[2] for n in notes] == [
        "out of memory with 2 batches waiting inside a block, went on with one at a time",
        "out of memory with 4 windows at a time, went on with 2",
        "out of memory with 2 windows at a time, went on with 1",
    ]
    assert_compared(compared, 8)
    assert digest(tmp_path / "again") == digest(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("at", [2, 4, 6, 8])
def test_memory_that_runs_out_as_a_stage_is_solved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, later: bool
) -> None:
    """Each linear is accounted for once, whatever had been solved by then."""
    source, notes = model_dir(tmp_path), []  # type: ignore[var-annotated]
    _, expected = run(source, tmp_path / "whole")
    set_profile(monkeypatch, commits_later=later)
    fails_once(monkeypatch, at, block_quantizer, "solve_group")
    _, results = run(source, tmp_path / "again", notes=notes)
    assert len(notes) == 1
    assert results == expected
    assert digest(tmp_path / "again") == digest(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("later", [False, True])
def test_one_window_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: bool) -> None:
    """The message names the block; finished blocks are kept."""
    set_profile(monkeypatch, commits_later=later)
    source = model_dir(tmp_path)
    forward, seen = Walk.forward, [0]

    def limited(block: Any, hidden: Any, others: Any) -> Any:
        seen[0] += 1
        if seen[0] > 7:
            raise full()
        return forward(block, hidden, others)

    monkeypatch.setattr(Walk, "forward", staticmethod(limited))
    with pytest.raises(
        StageError, match=r"layers.1: out of memory on cpu with one window at a time: shorten calibration"
    ):
        run(source, tmp_path / "out")
    assert len(Journal(tmp_path / "out" / "blocks.json").blocks) == 1
    monkeypatch.undo()
    run(source, tmp_path / "whole")
    run(source, tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_packing_that_finds_no_room_goes_on_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model_dir(tmp_path)
    run(source, tmp_path / "whole")
    layout = SimpleNamespace(pack=FORMATS["gptq"].pack)
    calls = fails_once(monkeypatch, 3, layout, "pack")
    monkeypatch.setitem(FORMATS, "gptq", replace(FORMATS["gptq"], pack=layout.pack))
    run(source, tmp_path / "out")
    assert calls[0] == 14 + 1
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.slow
def test_what_was_set_aside_is_looked_at_again_when_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference cycle may keep memory that the next try needs."""

    class Ring:
        def __init__(self) -> None:
            self.itself = self

    ring = Ring()
    gone = weakref.ref(ring)
    found: list[bool] = []
    leaner = OutOfMemoryRecovery.leaner

    def validated(self: OutOfMemoryRecovery, *args: Any) -> Any:
        done = leaner(self, *args)
        found.append(gone() is None)
        return done

    monkeypatch.setattr(OutOfMemoryRecovery, "leaner", validated)
    fails_once(monkeypatch, 3, Walk, "forward")
    gc.freeze()
    del ring
    try:
        run(model_dir(tmp_path), tmp_path / "out")
    finally:
        gc.unfreeze()
    assert found == [True]


@pytest.mark.parametrize(
    ("failures", "owner", "name"),
    [([6], block_quantizer, "solve_group"), ([5, 5], HiddenStateStore, "put")],
    ids=["in the second block", "after the first block was solved"],
)
def test_the_collector_is_frozen_again_after_recovery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: list[int], owner: Any, name: str
) -> None:
    """The next block whose linears are solved freezes what lives through all blocks."""
    events: list[str] = []
    leaner = OutOfMemoryRecovery.leaner

    def frozen(_: torch.device) -> None:
        freeze_garbage_collector(SimpleNamespace(type="cuda"))  # type: ignore[arg-type]
        events.append("frozen")

    def recovered(self: OutOfMemoryRecovery, *args: Any) -> Any:
        plan = leaner(self, *args)
        events.append("recovered")
        assert gc.get_freeze_count() == 0
        return plan

    monkeypatch.setattr(block_quantizer, "freeze_garbage_collector", frozen)
    monkeypatch.setattr(OutOfMemoryRecovery, "leaner", recovered)
    for at in failures:
        fails_once(monkeypatch, at, owner, name)
    try:
        run(model_dir(tmp_path), tmp_path / "out")
        assert events == ["frozen", "recovered", "frozen"]
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
