"""SIGINT, SIGTERM and SIGHUP: a documented end with a message, and a run that resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from campaigns.interruptions import TIMES, moment, signalled
from campaigns.verdicts import End, Tally, fault_of
from campaigns.workshop import ROOT, Workshop
from requant.cli.exit_codes import MEANINGS

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STARTING = 0.15  # share of signals that meet a fresh interpreter while it imports
DEADLY = frozenset({-signal.SIGHUP, -signal.SIGTERM, -signal.SIGINT})  # before the command has begun


def started_and_signalled(shop: Workshop, runs: Path, number: int, seconds: float) -> End:
    """A fresh interpreter that gets a signal while it starts."""
    argv = [sys.executable, "-m", "requant", *map(str, shop.run_of(runs))]
    places = os.pathsep.join(str(ROOT / name) for name in ("pipeline", "eval"))
    with subprocess.Popen(
        argv, env=os.environ | {"PYTHONPATH": places}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        time.sleep(seconds)
        process.send_signal(number)
        text = process.communicate(timeout=120)[0]
    return End(code=process.returncode, text=text, seconds=seconds, peak=0)


def interrupted(shop: Workshop, rng: Random, runs: Path) -> tuple[End, str, str]:
    number = rng.choice(SIGNALS)
    if rng.random() < STARTING:
        seconds = rng.uniform(0.05, 3.0)
        end, label = started_and_signalled(shop, runs, number, seconds), f"{number.name} at start, {seconds:.2f} s"
        cause = fault_of(end, frozenset(MEANINGS) | DEADLY)
    else:
        seconds = max(0.1, moment(shop, rng, rng.choice(TIMES)))
        end, label = signalled(shop, runs, number, seconds), f"{number.name} after {seconds:.2f} s"
        cause = fault_of(end, frozenset(MEANINGS) | ({-number} if number == signal.SIGHUP else set()))
        if not cause and end.code not in (0, 130, 128 + number, -number):
            cause = f"ended {end.code}"
    if cause:
        return end, f"{number.name}: {cause}", label
    return *shop.resumed(runs), label


@pytest.mark.slow
def test_signalled_runs_say_so_and_resume(interrupt: Callable[..., Tally]) -> None:
    tally = interrupt("signals", interrupted, whole=60, sample=1)
    assert not tally.faults, tally.summary()
