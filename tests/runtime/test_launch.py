"""`requant.runtime.launch` and the command line under a launcher: one output, one exit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pico
from helpers.e2e import forks, write_recipe, write_rows
from helpers.ranks import ROOT, environment, free_port

from requant import quantize
from requant.checkpoint.reader import Checkpoint
from requant.cli.main import _run
from requant.errors import InputError, RecipeError, RequantError, StageError
from requant.numerics.grid import Grid
from requant.quantize import block_quantizer
from requant.quantize.plan import Settings
from requant.runtime import launch, signals
from requant.runtime.device import PROFILES
from requant.runtime.ranks import Ranks
from requant.runtime.signals import RESUMES

PATHS = os.pathsep.join(str(ROOT / d) for d in ("pipeline", "eval", "tests"))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node"]


def work(who: str, *, ranks: Ranks) -> None:
    """Fails on rank `who`, or on all, while the others wait for it."""
    if who in (str(ranks.rank), "all"):
        raise StageError(f"the disk of {who} is full")
    ends = {"killed": (1, signal.SIGKILL), "first killed": (0, signal.SIGKILL), "terminated": (1, signal.SIGTERM)}
    rank, number = ends.get(who, (None, signal.SIGTERM))
    if ranks.rank == rank or who == "all terminated":
        os.kill(os.getpid(), number)
    ranks.all(True)
    time.sleep(30 if who in ends else 0)


def command(who: str) -> None:
    """As the command line: a message and an exit code."""
    try:
        if who == "recipe":
            raise RecipeError("recipe.yaml:1: no such key")
        launch.current_ranks().call(work, who, first_rank_only={})
    except RequantError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def launched(rank: int, port: int, who: str, said: Path) -> None:
    """One of two ranks, in a process of its own; its stderr is written to a file."""
    signals.raise_on_termination()
    os.dup2(os.open(said / str(rank), os.O_CREAT | os.O_WRONLY), 2)
    os.environ.update(environment(rank, port))
    launch.run_on_all_ranks(lambda: command(who))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "message", "codes"),
    [
        ("0", "error: the disk of 0 is full", [1, 1]),
        ("1", "error: rank 1: the disk of 1 is full", [1, 1]),
        ("all", "error: the disk of all is full", [1, 1]),
        (
            "killed",
            "error: another rank ended: the launcher's output says why; the same command resumes the run",
            [1, -9],
        ),
        (
            "first killed",
            "error: rank 1: another rank ended without a word (killed, or out of memory?): " + RESUMES,
            [-9, 1],
        ),
        ("terminated", "error: rank 1: terminated (SIGTERM): " + RESUMES, [143, 143]),
        ("recipe", "error: recipe.yaml:1: no such key", [2, 0]),  # nobody was called: the others just go
    ],
)
def test_what_fails_on_one_rank_ends_all_and_is_said_once(
    tmp_path: Path, who: str, message: str, codes: list[int]
) -> None:
    port = free_port()
    ranks = [forks().Process(target=launched, args=(rank, port, who, tmp_path)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == codes
    said = [line for rank in (0, 1) for line in (tmp_path / str(rank)).read_text().splitlines()]
    assert [line for line in said if "rror" in line] == [message]


def quantizing(rank: int, port: int, source: Path, out: Path, said: Path) -> None:
    """One of two ranks; the second fails in block 2 while block 1 is not yet handed over."""
    os.dup2(os.open(said / str(rank), os.O_CREAT | os.O_WRONLY), 2)
    os.environ.update(environment(rank, port))
    torch.set_num_threads(1)
    PROFILES["cpu"] = replace(PROFILES["cpu"], commits_later=True)
    stage = block_quantizer.Quantizer._solve_group

    def failing(self: Any, block: Any, prefix: str, *rest: Any) -> None:
        if rank == 1 and prefix.endswith(".1."):
            raise StageError("a shard ends early")
        stage(self, block, prefix, *rest)

    block_quantizer.Quantizer._solve_group = failing  # type: ignore[method-assign]
    options: dict[str, Any] = {"dtype": torch.float16, "device": torch.device("cpu"), "batch": 2}
    ids, settings = pico.ids(8, 32, seed=3), Settings(grid=Grid(4, 32))

    def command() -> None:
        launch.current_ranks().call(quantize.quantize, source, out, ids, settings, first_rank_only={}, **options)

    launch.run_on_all_ranks(command)


@pytest.mark.slow
def test_what_one_rank_alone_finds_wrong_ends_all_while_a_block_is_to_be_handed_over(tmp_path: Path) -> None:
    source, out = pico.save(pico.model(), tmp_path / "merged", torch.float16), tmp_path / "out"
    out.mkdir()
    port = free_port()
    ranks = [forks().Process(target=quantizing, args=(rank, port, source, out, tmp_path)) for rank in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [1, 1]
    assert "rank 1: a shard ends early" in (tmp_path / "0").read_text() + (tmp_path / "1").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
def test_torchrun_runs_a_recipe(project: Path, finished: Path, tmp_path: Path, number: int) -> None:
    write_rows(tmp_path / "canaries.jsonl", [{"prompt": f"Is {n} a number?", "answer": "no"} for n in range(3)])
    changes = {"output.dir": str(tmp_path), "canaries": {"path": str(tmp_path / "canaries.jsonl")}}
    recipe = write_recipe(project, changes, name="ranks.yaml")
    env = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *TORCHRUN, str(number), "-m", "requant", "run", str(recipe)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("merge, quantize, evaluate, report done: ") == 1
    assert done.stderr.count("quantize: started") == 1
    events = [json.loads(line) for line in (tmp_path / "pico" / "events.jsonl").read_text().splitlines()]
    assert [e["stage"] for e in events if e["event"] == "done"] == ["merge", "quantize", "evaluate", "report"]
    assert_same_layout(finished / "gptq", tmp_path / "pico" / "gptq")
    one, several = (json.loads((path / "report.json").read_text()) for path in (finished, tmp_path / "pico"))
    assert several["facts"]["canaries"]["right"].keys() == {"base", "adapter", "merged", "gptq"}
    for alone, split in zip(one["sets"], several["sets"], strict=True):
        assert split["digest"] == alone["digest"]
        assert_same_numbers(split, alone)


def assert_same_layout(got: Path, wanted: Path) -> None:
    """Configs, names, shapes and dtypes are equal. Codes are compared in `test_ranks`."""
    assert (got / "config.json").read_text() == (wanted / "config.json").read_text()
    assert {n: (i.dtype, i.shape) for n, i in Checkpoint(got).items()} == {
        n: (i.dtype, i.shape) for n, i in Checkpoint(wanted).items()
    }


def assert_same_numbers(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Some rank scored every token of every variant once: sums and distances agree.

    Sums are by document, distances from the reference.

    The codes of gptq come from sums in another order, and one on the edge between two levels decides what follows it: its
    scores are near, those of the others the same.
    """
    assert got["documents"].keys() == wanted["documents"].keys()
    for name, sums in wanted["documents"].items():
        assert got["documents"][name]["n"] == sums["n"]
        assert got["documents"][name]["nll"] == pytest.approx(sums["nll"], rel=0.05 if name == "gptq" else 1e-5)
    for edge, alone in zip(got["edges"], wanted["edges"], strict=True):
        assert (edge["from"], edge["to"]) == (alone["from"], alone["to"])
        if alone["agreement"] is not None and alone["to"] != "gptq":
            undecided = 2 / wanted["n_scored"]  # tokens whose two best logits are the same but for rounding
            assert edge["agreement"]["value"] == pytest.approx(alone["agreement"]["value"], abs=undecided)
            assert edge["kl"]["mean"]["value"] == pytest.approx(alone["kl"]["mean"]["value"], rel=1e-3, abs=1e-9)


def test_idle_gpus_are_pointed_out_in_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(project, {"device": "auto"}, name="auto.yaml")

    def stopped(*_: object, **__: object) -> None:
        raise InputError("stopped")

    monkeypatch.setattr("requant.run.run", stopped)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(InputError, match="stopped"):
        _run(recipe, [], "report")
    assert capsys.readouterr().err == (
        f"1 of 4 GPUs is used; for all: torchrun --standalone --nproc-per-node 4 -m requant run {recipe}\n"
        "prepare: started\n"
    )
    assert not launch.idle_gpus_hint("cuda:1", recipe), "this one was asked for"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert not launch.idle_gpus_hint("auto", recipe)
