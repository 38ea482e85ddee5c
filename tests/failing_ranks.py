"""A command on all ranks that a launcher started, failing on the one that is named first; see test_crew.py."""

from __future__ import annotations

import sys

from requant import crew
from requant.errors import RecipeError, RequantError, StageError
from requant.ranks import Ranks


def work(who: str, *, ranks: Ranks) -> None:
    """Fails on rank `who`, or on all, while the others wait for it."""
    if who in (str(ranks.rank), "all"):
        raise StageError(f"the disk of {who} is full")
    ranks.every(True)


def command() -> None:
    """As the command line: a message and an exit code."""
    try:
        if sys.argv[1] == "recipe":
            raise RecipeError("recipe.yaml:1: no such key")
        crew.here().call(work, sys.argv[1], own={})
    except RequantError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    crew.together(command)
