"""`requant.runtime.signals` and the command line: SIGTERM and SIGHUP end as Ctrl-C does."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys
from requant.cli import main, run_paths

number = int(sys.argv.pop())
if sys.argv[1] == "ignored":
    signal.signal(sys.argv.pop(1) and number, signal.SIG_IGN)
run_paths.load_recipe = lambda *_: (os.kill(os.getpid(), number), sys.exit(7))
if sys.argv[1] == "building":
    sys.modules["requant.cli.main"].app = lambda **_: os.kill(os.getpid(), number)
if sys.argv[1] == "parsing":
    sys.modules["typer.core"].TyperGroup.make_context = lambda *_, **__: os.kill(os.getpid(), number)
if sys.argv[1] == "swallowed":
    def load(*_):
        try:
            os.kill(os.getpid(), number)
        except KeyboardInterrupt as error:
            raise ValueError("a library's") from error
    run_paths.load_recipe = load
    sys.argv[1:] = ["run", "recipe.yaml"]
main()
"""


def run(*argv: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, *argv], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("number", "line", "code"),
    [
        (signal.SIGINT, "interrupted\n", 130),
        (signal.SIGTERM, "terminated (SIGTERM)\n", 143),
        (signal.SIGHUP, "terminated (SIGHUP)\n", 129),
    ],
)
def test_a_signal_ends_a_command_with_one_line_and_its_code(number: int, line: str, code: int) -> None:
    assert run("run", "recipe.yaml", str(int(number))) == (code, "", line)


@pytest.mark.parametrize("when", ["building", "parsing", "swallowed"])
def test_a_signal_before_a_command_has_begun_is_told_too(when: str) -> None:
    """Of a signal while arguments were parsed nothing was said, and the code was that of SIGINT."""
    assert run(when, str(int(signal.SIGTERM))) == (143, "", "terminated (SIGTERM)\n")


STARTING = """
import atexit, importlib.abc, os, runpy, sys

when, number = sys.argv[1], int(sys.argv.pop())

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "typer":
            os.kill(os.getpid(), number)

if when == "imports":
    sys.meta_path.insert(0, Finder())
else:
    atexit.register(os.kill, os.getpid(), number)
runpy.run_module("requant", run_name="__main__")
"""


@pytest.mark.parametrize("when", ["imports", "--version"])
@pytest.mark.parametrize(
    ("number", "line", "code"),
    [(signal.SIGINT, "interrupted\n", 130), (signal.SIGTERM, "terminated (SIGTERM)\n", 143)],
)
def test_a_signal_before_and_after_the_command_is_no_traceback(when: str, number: int, line: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTING, when, str(int(number))], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (code, line)


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    assert run("ignored", "run", "recipe.yaml", str(int(signal.SIGHUP))) == (7, "", "")


@pytest.mark.parametrize("closed", [">/dev/full", ">&-", "2>&-"])
def test_an_output_that_takes_nothing_is_no_traceback(closed: str) -> None:
    """--version prints one line; a full disk is said, a closed stdout or stderr is not missed."""
    command = f"{sys.executable} -m requant --version {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    full = "error: the output of this command: No space left on device\n" if closed == ">/dev/full" else ""
    assert (done.returncode, done.stderr) == (1 if full else 0, full)
