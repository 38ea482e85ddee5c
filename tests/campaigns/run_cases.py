"""Mutated results: report.json, gates, scores, states, finished and interrupted runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import cache
from pathlib import Path

from campaigns.cases import Bench, Case, perhaps_strange
from campaigns.mutations import changed_bytes, changed_json
from campaigns.same_run import difference
from campaigns.tensor_mutations import changed_tensors, changed_values
from campaigns.workshop import Workshop
from requant import recipe as recipes
from requant.quantize import background_writer
from requant.run import runner
from requant.run.observer import Watcher

GATES = (
    "", "x", "ppl_increase", "ppl_increase in-domain", "ppl_increase in-domain 5%%", "ppl_increase nope 5%",
    "kl in-domain nan",
    "kl in-domain inf", "kl in-domain -1", "retention in-domain 1e400%", "ppl_increase in-domain " + "9" * 5000 + "%",
    "a b c d e f",
    "perplexity general 0", "agreement in-domain 150%", "right_to_wrong \x1b[31m 5%", "ppl_increase in-domain 5% rtn",
    "[red]x[/] y 5%",
    "ppl_increase in-domain 5% relative_to rtn", "retention general ٣%", "\udc80 x 5%", "ppl_increase in-domain 5_0%",
    "kl in-domain 1e",
)  # fmt: skip
INTERRUPTED = ("merge:1", "quantize:1", "heal:8", "evaluate:3")


@cache
def _report(file: Path) -> str:
    return file.read_text()


def _mutated_report(bench: Bench) -> tuple[Path, str]:
    """A run's directory that has a report.json alone, changed."""
    text = _report(bench.shop.finished / "report.json")
    data, label = changed_json(json.loads(text), bench.rng, depth=bench.rng.choice((2, 3, 5, 7, 9)), trees=0.85)
    folder = bench.folder / "run"
    folder.mkdir()
    (folder / "report.json").write_bytes(data)
    return folder, perhaps_strange(bench, folder / "report.json", label)


def report(bench: Bench) -> Case:
    """`requant report RUN` renders it again."""
    folder, label = _mutated_report(bench)
    more = ["--junit", bench.folder / "junit.xml"] if bench.rng.random() < 0.3 else []
    return Case(argv=["report", folder, *more], label=label)


def gate(bench: Bench) -> Case:
    folder, label = _mutated_report(bench)
    return Case(argv=["gate", folder], label=label)


def gate_option(bench: Bench) -> Case:
    wanted = bench.rng.choice(GATES)
    return Case(argv=["gate", bench.shop.finished, "--gate", wanted], label=f"--gate {wanted[:50]!r}")


def compare(bench: Bench) -> Case:
    folder, label = _mutated_report(bench)
    if bench.rng.random() < 0.3:
        variant = bench.rng.choice(("gptq", "x", "merged", "", "\x1b[2J"))
        return Case(
            argv=["compare", f"{folder}:{variant}", f"{bench.shop.finished}:healed"], label=f"{variant!r} {label}"
        )
    made = [word for kind in ("html", "markdown", "json") for word in (f"--{kind}", bench.folder / f"c.{kind}")]
    return Case(argv=["compare", f"{folder}:gptq", f"{bench.shop.finished}:merged", *made], label=label)


# --- run directories ---


def _copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, symlinks=True)
    return target


class Dying(Watcher):
    """Ends the process without cleaning up at the n-th step that a stage tells of."""

    def __init__(self, stage: str, steps: int) -> None:
        self.wanted, self.left, self.now = stage, steps, ""

    def stage(self, name: str, *, done: bool) -> None:
        self.now = name

    def progress(self, done: int, total: int, note: str = "") -> None:
        self.left -= self.now == self.wanted
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def die_in(recipe: str, runs: str, when: str) -> None:
    """Run until a step of a stage, and die there: what the fork server runs to make an interrupted run."""
    background_writer.BEHIND = 0  # each block is told of before the next is on its way
    stage, step = when.split(":")
    runner.run(recipes.load(recipe, overrides={"output.dir": runs}), watcher=Dying(stage, int(step)))


def interrupted(shop: Workshop, when: str) -> Path:
    """The directory of a run that was killed at `when`; made once."""
    folder = shop.folder / "interrupted" / when.replace(":", "-")
    if not folder.exists():
        told = [f"{__name__}:die_in", shop.recipe, folder, when]
        end = shop.requant.run(told)
        if end.code != -9:
            raise RuntimeError(f"{when}: {end.code} {end.text[-1000:]}")
    return folder / "pico"


def _damaged(bench: Bench, run: Path, files: list[Path]) -> str:
    """Damage one file of a run directory; what was done."""
    rng = bench.rng
    file = rng.choice(sorted(files))
    data = file.read_bytes()
    if file.suffix == ".safetensors":
        made, label = changed_tensors(data, rng) if rng.random() < 0.7 else changed_values(data, rng)
    elif file.suffix == ".json" and data:
        made, label = changed_json(json.loads(data), rng, trees=0.6)
    else:
        made, label = changed_bytes(data, rng)
    if file.is_symlink():
        file.unlink()
    file.write_bytes(made)
    told = perhaps_strange(bench, file, label)
    return f"{file.relative_to(run)} {told.removeprefix(file.name).strip()}"


def _run_again(bench: Bench, run: Path, files: list[Path], where: str) -> Case:
    label = _damaged(bench, run, files)
    changes = {"gates.0.max": "400%"} if bench.rng.random() < 0.3 and where == "finished" else {}
    # A memory of digests that lies makes other keys and the same files; what a manifest says of its origin is its own.
    keys = ".digests.json" not in label and "manifest.json" not in label
    # a report that a user has damaged is theirs: a finished run need not look at it
    theirs = label.startswith(("report.", "log.txt", "events.jsonl", "recipe.yaml"))
    return Case(
        argv=bench.shop.run_of(run.parent, changes=changes), label=f"{where}: {label}",
        judge=None if theirs else lambda: difference(run, bench.shop.finished, gates=not changes, keys=keys), job={"cpu": 60.0},
    )  # fmt: skip


def finished_run(bench: Bench) -> Case:
    """`requant run` over a finished run of which one file was damaged: refused, done again, or of no effect."""
    run = _copy(bench.shop.finished, bench.folder / "runs" / "pico")
    return _run_again(bench, run, [f for f in run.rglob("*") if f.is_file()], "finished")


def states(bench: Bench) -> Case:
    """`requant run` over an interrupted run whose states, journals, scores or half-written files were damaged."""
    when = bench.rng.choice(INTERRUPTED)
    run = _copy(interrupted(bench.shop, when), bench.folder / "runs" / "pico")
    hidden = [f for f in run.rglob("*") if f.is_file() and any(p.startswith(".") for p in f.relative_to(run).parts)]
    return _run_again(bench, run, hidden, when)


def planted(bench: Bench) -> Case:
    """A run's directory, made by a stranger, in which links lead out of it; nothing outside may change."""
    run = _copy(bench.shop.finished, bench.folder / "runs" / "pico")
    victim = bench.folder / "victim.txt"
    victim.write_text("mine\n")
    rng, told = bench.rng, []
    for _ in range(rng.choice((1, 1, 3))):
        name = rng.choice(PLANTED)
        place = run / name
        place.parent.mkdir(exist_ok=True)
        if place.is_file() or place.is_symlink():
            place.unlink()
        if not place.exists():
            place.symlink_to(victim)
            told.append(name)
    which = rng.choice(("report", "run", "gate", "verify"))
    argv: list[object] = [which, run if which != "verify" else run / "gptq"]
    if which == "run":
        argv = bench.shop.run_of(run.parent, changes={"gates.0.max": "400%"})
    if which == "gate":
        argv += ["--junit", run / "junit.xml"]

    def judge() -> str:
        return "" if victim.read_text() == "mine\n" else "a file outside was written through a link"

    return Case(argv=argv, label=f"{which} {', '.join(told)}", judge=judge, job={"cpu": 60.0, "always": True})


PLANTED = (
    "report.md", "report.html", "report.json", "log.txt", "events.jsonl", "recipe.yaml", ".stages.json",
    ".digests.json", ".requant.json",
    "gptq/README.md", "healed/README.md", "gptq/manifest.json", "junit.xml", ".report.md.tmp", ".report.json.tmp",
    ".report.html.tmp",
    ".stages.json.tmp", "..stages.json.tmp", ".recipe.yaml.tmp", "gptq/.README.md.tmp", ".cache/sample.json",
    ".junit.xml.tmp",
)  # fmt: skip
MAKERS = ((report, 12), (gate, 6), (gate_option, 3), (compare, 8), (states, 2), (finished_run, 2), (planted, 3))
