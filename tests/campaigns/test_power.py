"""A power loss after any call: whatever the disk then holds, the same command finishes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from campaigns import crash_states, syscall_layer
from campaigns.verdicts import End, Tally
from campaigns.workshop import Workshop

needs_layer = pytest.mark.skipif(not syscall_layer.usable(), reason="needs seccomp notifications (Linux 5.5, x86-64)")


def lost(shop: Workshop, rng: Random, runs: Path) -> tuple[End, str, str]:
    """One state after a power loss, resumed."""
    assert shop.record is not None
    number = rng.randrange(1, len(shop.record.events))
    disk, label = crash_states.state_after(shop.record.events[:number], rng)
    disk.write(runs)
    return *shop.resumed(runs), label


@needs_layer
@pytest.mark.slow
def test_power_losses_leave_what_a_run_resumes_from(interrupt: Callable[..., Tally]) -> None:
    tally = interrupt("power", lost, whole=100, sample=1)
    assert not tally.faults, tally.summary()


@needs_layer
@pytest.mark.slow
def test_the_record_is_what_lies_on_the_disk(shop: Workshop) -> None:
    """Every call was seen: replayed, they give the very files of the run."""
    assert shop.record is not None
    told = {path: data for path, data in shop.record.now.files() if data is not None}
    runs = shop.finished.parent
    real = {str(f.relative_to(runs)): f.read_bytes() for f in sorted(runs.rglob("*")) if f.is_file()}
    assert told.keys() == real.keys()
    assert [path for path in told if told[path] != real[path]] == []
