"""`requant sweep`: what it prints, and its exit codes."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from helpers.command_line import Here
from helpers.e2e import copied, visible, write_recipe


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Here:
    monkeypatch.chdir(tmp_path)
    return Here(monkeypatch, capsys)


@pytest.fixture
def file(project: Path, tmp_path: Path) -> str:
    mine = copied(project, tmp_path / "project")
    return str(write_recipe(mine, {"evaluate.variants": ["base", "adapter", "gptq"]}))


@pytest.mark.slow
def test_a_sweep_ends_with_the_comparison_and_the_runs(here: Here, file: str, tmp_path: Path) -> None:
    assert here("sweep", file, "--set", "quantize.bits=3,4", "--set", "quantize.sweeps=1") == 0
    assert "1/2 pico-bits3 (quantize.bits=3)" in here.err
    assert "2/2 pico-bits4 (quantize.bits=4)" in here.err
    assert "Who is better" in here.out
    assert "Pareto front" in here.out
    last = here.out.splitlines()[-2:]
    assert last == ["merge, quantize, evaluate, report: runs/pico-bits3", "quantize, evaluate, report: runs/pico-bits4"]
    assert visible(tmp_path / "runs") == {"pico-bits3", "pico-bits4"}
    assert here("run", "runs/pico-bits4") == 0
    assert "nothing to do" in here.out
    with (tmp_path / "runs" / "pico-bits4" / ".requant.json").open() as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert here("sweep", file, "--set", "quantize.bits=3,4,8", "--set", "quantize.sweeps=1") == 1
    assert "pico-bits4 (quantize.bits=4) failed: runs/pico-bits4: another requant is running here" in here.err
    assert "1 of 3 failed, the same command goes on with them: pico-bits4 (quantize.bits=4)" in here.err
    assert here.out.splitlines()[-2:] == ["up to date: runs/pico-bits3", "quantize, evaluate, report: runs/pico-bits8"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["quantize.bits=3"], "a sweep combines the values of a key"),
        (["quantize.bits="], "--set quantize.bits: no values"),
        (["quantize.bits=3,5"], "quantize.bits=5: --set quantize.bits: 5 is not one of"),
        (["quantize.bits=3,3"], "ask for the same"),
        (["quantize.group_size=32,128"], "pico-group_size128 (quantize.group_size=128): "),
    ],
)
def test_bad_settings_are_told_before_any_work(
    here: Here, file: str, tmp_path: Path, settings: list[str], said: str
) -> None:
    assert here("sweep", file, *(part for setting in settings for part in ("--set", setting))) == 2
    assert said in here.err
    assert "Traceback" not in here.err
    assert not (tmp_path / "runs").exists()


def test_a_sweep_needs_settings(here: Here, file: str) -> None:
    assert here("sweep", file) == 2
    assert "--set" in here.err


def test_an_interrupted_sweep_says_how_it_goes_on(here: Here, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from requant.run import sweep

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run_prepared", interrupt)
    assert here("sweep", file, "--set", "quantize.bits=3,4") == 130
    assert "the same command resumes the run" in here.err
