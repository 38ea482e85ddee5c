"""The fuzz campaign: inputs drawn by kind and number, run, judged, counted and kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

from campaigns import format_cases, model_cases, run_cases, text_cases
from campaigns.cases import Bench, Case, Maker
from campaigns.verdicts import End, Tally, fault_of
from campaigns.workshop import CPU_SECONDS, Workshop

MAKERS: dict[str, tuple[Maker, int]] = {
    maker.__name__: (maker, weight)
    for rows in (model_cases.MAKERS, text_cases.MAKERS, run_cases.MAKERS, format_cases.MAKERS)
    for maker, weight in rows
}


def drawn(seed: int, size: int) -> list[tuple[str, int]]:
    """Kinds and numbers of a campaign's inputs: by weight, at least one of every kind."""
    total = sum(weight for _, weight in MAKERS.values())
    counts = {kind: max(1, round(size * weight / total)) for kind, (_, weight) in MAKERS.items()}
    inputs = [(kind, number) for kind, count in counts.items() for number in range(count)]
    Random(seed).shuffle(inputs)
    return inputs


def make(shop: Workshop, seed: int, kind: str, number: int) -> tuple[Case, Path]:
    """The same case for the same seed, kind and number."""
    folder = shop.fresh(f"{kind}-{number}")
    return MAKERS[kind][0](Bench(shop, folder, Random(f"{seed}:{kind}:{number}"))), folder


def attempt(shop: Workshop, case: Case) -> tuple[End, str]:
    """Run a case: its end, and the root cause of a bad one."""
    end = shop.requant.run(case.argv, cpu=case.job.get("cpu", CPU_SECONDS), cwd=shop.folder / "tmp")
    cause = fault_of(end)
    if not cause and case.judge and (end.code == 0 or case.job.get("always")):
        wrong = case.judge()
        cause = f"silent: {wrong}" if wrong else ""
    return end, cause


def command_of(seed: int, kind: str, number: int) -> str:
    """The command that repeats one input and shows its output."""
    return f"pytest tests/campaigns/test_fuzz.py -s --campaign-seed {seed} --campaign-only {kind}:{number}"


def campaign(shop: Workshop, seed: int, inputs: list[tuple[str, int]], keep: Path) -> Tally:
    """Run all inputs. keep: a directory for the first input of every root cause, and the running summary."""
    tally = Tally(f"fuzz, seed {seed}")
    keep.mkdir(parents=True, exist_ok=True)
    for done, (kind, number) in enumerate(inputs, 1):
        case, folder = make(shop, seed, kind, number)
        end, cause = attempt(shop, case)
        if tally.add(kind, end, cause, repeat=command_of(seed, kind, number), label=case.label):
            shutil.rmtree(keep / folder.name, ignore_errors=True)
            shutil.move(folder, keep / folder.name)
            (keep / f"{folder.name}.txt").write_text(f"{case.argv}\n{end.text}", errors="backslashreplace")
        shutil.rmtree(folder, ignore_errors=True)
        if done % 25 == 0:
            tally.save(keep / "summary.txt")
    tally.save(keep / "summary.txt")
    return tally
