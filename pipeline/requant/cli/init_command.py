"""`requant init`: a starter recipe on the terminal or in a new file."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from requant.cli.wrapping import say
from requant_eval.escaping import visible


def init(
    adapter: Annotated[str, typer.Argument(help="PEFT directory or hub id.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write it there. A file that exists is never changed."),
    ] = None,
) -> None:
    """Print a commented recipe for an adapter, or write it (-o)."""
    from requant.checkpoint.atomic_write import require_new, write_new
    from requant.recipe.template import starter

    if output is None:
        print(visible(starter(adapter, widths=_input_widths, positions=_positions)), end="")
        return
    require_new(output)
    write_new(output, starter(adapter, directory=output.parent, widths=_input_widths, positions=_positions))
    say(f"{output} written: edit the lines marked FIXME, then `requant check {output}`")


def _input_widths(directory: Path) -> Collection[int]:
    """As `run.check.input_widths`; torch is imported only here, after the adapter was read."""
    from requant.cli.foreign_output import quiet

    with quiet():
        from requant.run.check.input_widths import input_widths

        return input_widths(directory)


def _positions(directory: Path) -> int | None:
    """As `run.check.input_widths.known_positions`; imported as there."""
    from requant.cli.foreign_output import quiet

    with quiet():
        from requant.run.check.input_widths import known_positions

        return known_positions(directory)
