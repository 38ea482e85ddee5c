"""One of two gloo ranks is killed: the other ends, and one process resumes the run."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from campaigns.interruptions import moment
from campaigns.verdicts import TRACEBACK, End, Tally
from campaigns.workshop import Workshop

ENDS_WITHIN = 60.0  # seconds on a busy machine
SUMS = 1e-5  # two ranks add up in another order than one


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def orphaned(shop: Workshop, rng: Random, runs: Path) -> tuple[End, str, str]:
    """Two ranks, one of which gets a signal in a stage."""
    port, victim = free_port(), rng.randrange(2)
    number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        shop.requant.start(shop.run_of(runs), env=common | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)
    ]  # fmt: skip
    seconds = moment(shop, rng, "stage") * 1.3
    time.sleep(seconds)
    ranks[victim].send(number)
    until, label = time.monotonic() + ENDS_WITHIN, f"rank {victim} gets {number.name} after {seconds:.1f} s"
    while any(r.poll(0.05) is None for r in ranks) and time.monotonic() < until:
        pass
    hung = [r for r in ranks if r.end is None]
    ends = [r.end or r.stop("hang") for r in ranks]
    other = ends[1 - victim]
    if hung:
        return (
            ends[ranks.index(hung[0])],
            f"rank {'of the victim' if hung[0] is ranks[victim] else 'left'} hangs",
            label,
        )
    if TRACEBACK in other.text or "frame #" in other.text:
        return other, f"the rank left shows its frames ({number.name} to {'first' if not victim else 'other'})", label
    if other.code != 0 and not any(e.text.strip() for e in ends):
        return other, "no rank says a word", label
    return *shop.resumed(runs, digits=SUMS), label


@pytest.mark.slow
def test_a_rank_that_is_killed_is_told_by_the_other(interrupt: Callable[..., Tally]) -> None:
    tally = interrupt("ranks", orphaned, whole=20, sample=1)
    assert not tally.faults, tally.summary()
