"""Exit codes of all commands, and the line about them in each help text."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType

import typer

from requant.cli.wrapping import say
from requant.runtime import signals

MEANINGS = {
    0: "done",
    1: "the run failed",
    2: "the recipe or the command is wrong",
    3: "a gate failed",
    4: "a gate is inconclusive",
    129: "hung up (SIGHUP)",
    130: "interrupted",
    143: "terminated (SIGTERM)",
}
WORK = (0, 1, 2, 129, 130, 143)  # of commands that end before the gates are evaluated
GATES = (0, 1, 2, 3, 4)  # of commands that only read finished reports


def interrupted(error: KeyboardInterrupt, advice: str = "") -> typer.Exit:
    """The exception that ends the command after Ctrl-C, SIGTERM or SIGHUP, with one line on stderr.

    CPython keeps a mark of a KeyboardInterrupt that passed through code run by a C extension (an import, say), and dies
    of SIGINT at its end although it was handled. The next piece of code that is run through C takes the mark away.
    """
    number = signals.number_of(error)
    with suppress(OSError):
        say(f"{signals.word(number)}{advice and f'; {advice}'}", file=sys.stderr)
    ctypes.pythonapi.PyRun_SimpleString(b"0")
    return typer.Exit(signals.exit_code(number))


@contextmanager
def told() -> Iterator[None]:
    """Turn a signal inside into its line and exit code, also where a library has made an error of it."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise interrupted(error) from None
    except typer.Exit:
        raise
    except Exception:
        arrived = signals.arrived()
        if arrived is None:
            raise
        raise interrupted(arrived) from None


def epilog(codes: Iterable[int] = MEANINGS, for_command: Mapping[int, str] = MappingProxyType({})) -> str:
    r"""The last paragraph of a help text: one line a code.

    for_command: what a code means for one command alone.
    The mark \b keeps the lines as they are.
    """
    return "\b\nExit codes:\n" + "\n".join(f"  {code:<4} {for_command.get(code, MEANINGS[code])}" for code in codes)
