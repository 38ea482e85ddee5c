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
    text = starter(
        adapter, directory=output.parent, widths=_input_widths, positions=_positions, for_editors=True
    )  # read before anything is written
    told = _schema_beside(output)
    write_new(output, text)
    say(f"{output} written: edit the lines marked FIXME, then `requant check {output}`")
    say(told)


def _schema_beside(recipe: Path) -> str:
    """Write the schema that the recipe's first line names to editors, unless it is there; what was done, in words."""
    import json

    from requant.checkpoint.atomic_write import write_new
    from requant.recipe import json_schema
    from requant.recipe.template import SCHEMA_FILE
    from requant_eval import regular_files

    file, text = recipe.parent / SCHEMA_FILE, json.dumps(json_schema(), indent=2) + "\n"
    if not (file.exists() or file.is_symlink()):
        write_new(file, text)
        return f"{file} written: the recipe's first line names it to editors, which complete and explain its keys"
    if file.is_file() and regular_files.read_bytes(file) == text.encode():
        return f"{file} is there already, for editors"
    return f"{file} is not this version's, and is left as it is: `requant schema > {file}` renews it for editors"


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
