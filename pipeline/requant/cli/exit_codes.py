"""Exit codes of all commands, and the line about them in each help text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

MEANINGS = {
    0: "done",
    1: "the run failed",
    2: "the recipe or the command is wrong",
    3: "a gate failed",
    4: "a gate is inconclusive",
    130: "interrupted",
}
WORK = (0, 1, 2, 130)  # of commands that end before the gates are evaluated
GATES = (0, 1, 2, 3, 4)  # of commands that only read finished reports


def epilog(codes: Iterable[int] = MEANINGS, for_command: Mapping[int, str] = MappingProxyType({})) -> str:
    r"""The last paragraph of a help text: one line a code.

    for_command: what a code means for one command alone.
    The mark \b keeps the lines as they are.
    """
    return "\b\nExit codes:\n" + "\n".join(f"  {code:<4} {for_command.get(code, MEANINGS[code])}" for code in codes)
