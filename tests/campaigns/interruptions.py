"""Runs that are interrupted: when, by what, and whether they resume to the same bytes."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from campaigns import syscall_layer
from campaigns.verdicts import End, Tally
from campaigns.workshop import Workshop

Attempt = Callable[[Workshop, Random, Path], tuple[End, str, str]]  # end, root cause or "", what was done
TIMES = ("uniform", "stage", "mixed")


def moment(shop: Workshop, rng: Random, how: str) -> float:
    """Seconds from a run's start: any, or in a stage drawn first, so that short ones are met as often as long ones."""
    if how == "mixed":
        how = rng.choice(("uniform", "stage"))
    if how == "uniform":
        return rng.uniform(0.0, shop.seconds)
    first, last = shop.stages[rng.choice(sorted(shop.stages))]
    return rng.uniform(first, first + (last - first) * 1.1)


def signalled(shop: Workshop, runs: Path, number: int, seconds: float) -> End:
    """A run that gets a signal after so many seconds, unless it ended before."""
    running = shop.requant.start(shop.run_of(runs))
    until = time.monotonic() + seconds
    while running.poll(max(0.0, until - time.monotonic())) is None and time.monotonic() < until:
        pass
    if running.end is None:
        running.send(number)
    return running.wait()


def killed(shop: Workshop, rng: Random, runs: Path) -> tuple[End, str, str]:
    """One to three SIGKILLs, by the clock or before a call that writes, then resumed."""
    told, end = [], None
    for _ in range(rng.choices((1, 2, 3), (0.6, 0.25, 0.15))[0]):
        how = rng.choice((*TIMES, "call") if shop.record else TIMES)
        if how == "call":
            number = rng.randrange(1, len(shop.record.events)) if shop.record else 0
            end = shop.layered(runs, syscall_layer.kill_at(number))
            told.append(f"before call {number}")
        else:
            seconds = moment(shop, rng, how)
            end = signalled(shop, runs, signal.SIGKILL, seconds)
            told.append(f"{how} {seconds:.2f} s")
        if end.code not in (0, -signal.SIGKILL):
            return end, f"ended {end.code} when it was resumed", ", ".join(told)
    return *shop.resumed(runs), ", ".join(told)


def campaign(shop: Workshop, name: str, seed: int, numbers: list[int], attempt: Attempt, keep: Path) -> Tally:
    """Trials by number, each in a directory of its own; the directory of a failed one is kept."""
    tally = Tally(f"{name}, seed {seed}")
    keep.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        runs = shop.fresh(f"{name}-{number}")
        end, cause, label = attempt(shop, Random(f"{seed}:{name}:{number}"), runs)
        repeat = f"pytest tests/campaigns/test_{name}.py -s --campaign-seed {seed} --campaign-only {number}"
        if tally.add(name, end, cause, repeat=repeat, label=label):
            shutil.rmtree(keep / runs.name, ignore_errors=True)
            shutil.move(runs, keep / runs.name)
            (keep / f"{runs.name}.txt").write_text(f"{label}\n{end.text}", errors="backslashreplace")
        shutil.rmtree(runs, ignore_errors=True)
        tally.save(keep / "summary.txt")
    return tally
